"""Computes only the last logits: the output embedding is much of a small model's work."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


def last_logits(model: nn.Module, kept: int, length: int) -> dict[str, object]:
    """Return the arguments for the last logits; none where a model always computes all.

    Args:
        model: A Hugging Face causal language model.
        kept: Positions at the end whose logits are computed; 0 is all.
        length: Positions of the input.
    """
    if kept == 0 or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    # By index: of a slice of positions, torch would multiply a copy of the whole embedding.
    return {"logits_to_keep": torch.arange(max(0, length - kept), length)}
