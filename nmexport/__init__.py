"""Post-training N:M activation sparsity for LLMs, from a Hugging Face model to a served engine."""

from __future__ import annotations

import os

# ONNX Runtime reads this when it is imported: no telemetry, nothing written to the home folder.
# Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
