"""Versions of ONNX that the exported model is written in; no imports: a stage's key needs them."""

from __future__ import annotations

OPSET = 23
"""Default-domain opset of the exported model; bodies are valid from 18 on."""
IR_VERSION = 10
"""The first with function overloads."""
