"""Post-training N:M activation sparsity for LLMs, from a Hugging Face model to a served engine."""

from __future__ import annotations

__version__ = "0.1.0"
