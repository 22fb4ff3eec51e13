"""Names of an export's files and folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "model.onnx"
DENSE = "dense"
STORED = "stored"
"""Folder inside it of the dense model in the sparse one's integers, where weights are so."""
GENAI_CONFIG = "genai_config.json"


def stored_model(export: Path) -> Path | None:
    """Find the dense model in the sparse one's integers; None where there is none."""
    path = export / DENSE / STORED / MODEL
    return path if path.is_file() else None
