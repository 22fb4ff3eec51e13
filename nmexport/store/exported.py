"""Names of an export's files and folders."""

from __future__ import annotations

MODEL = "model.onnx"
DENSE = "dense"
STORED = "stored"
"""Folder inside it of the dense model in the sparse one's integers, where weights are so."""
GENAI_CONFIG = "genai_config.json"
