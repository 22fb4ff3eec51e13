"""Baselines for activation sparsity, in torch: nothing here is exported or calibrated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from nmexport.sparsity.linear import bias_of
from nmexport.sparsity.mask import keep_mask, scores_of

if TYPE_CHECKING:
    from nmexport.sparsity.pattern import NMPattern
    from nmexport.sweep.plan import Baseline


class TopKLinear(nn.Module):
    """A linear that reads only the largest inputs of each token, wherever they lie."""

    def __init__(self, linear: nn.Linear, zeros: float) -> None:
        """Wrap a dense linear.

        Args:
            linear: The dense linear, unchanged.
            zeros: Share of inputs that are dropped.
        """
        super().__init__()
        self.linear = linear
        self.kept = kept_count(linear.in_features, zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` T -> `[..., O]` T, in float32 with one rounding at the end."""
        x32 = x.to(torch.float32)
        kept = torch.where(largest(x32.abs(), self.kept), x32, 0.0)
        bias = bias_of(self.linear)
        y = nn.functional.linear(
            kept, self.linear.weight.to(torch.float32), None if bias is None else bias.float()
        )
        return y.to(x.dtype)


def replacement(linear: nn.Linear, baseline: Baseline) -> nn.Module:
    """Return the module that replaces a dense linear."""
    if baseline.what == "weights":
        return _prune(linear, baseline.pattern, baseline.zeros)
    return TopKLinear(linear, baseline.zeros or 0.0)


def kept_count(size: int, zeros: float) -> int:
    """Return how many elements of `size` are kept; at least one."""
    return max(1, size - math.floor(size * zeros + 0.5))


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` largest of the last axis; of equal scores the earlier ones."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, value=True)


def pruned_weight(
    weight: torch.Tensor, pattern: NMPattern | None, zeros: float | None
) -> torch.Tensor:
    """Prune a weight `[O, K]` by magnitude: in groups along K, or the smallest of all."""
    scores = scores_of(weight)
    if pattern is not None:
        keep = keep_mask(scores, pattern)
    else:
        count = kept_count(weight.numel(), zeros or 0.0)
        keep = largest(scores.reshape(-1), count).view_as(scores)
    return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype))


def _prune(linear: nn.Linear, pattern: NMPattern | None, zeros: float | None) -> nn.Linear:
    bias = bias_of(linear)
    pruned = nn.Linear(
        linear.in_features, linear.out_features, bias=bias is not None, device="meta"
    )
    weight = pruned_weight(linear.weight.detach(), pattern, zeros)
    pruned.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        pruned.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return pruned
