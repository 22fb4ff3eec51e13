"""The method as the paper states it, before folding: what the folded linear must agree with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear, bias_of, variance_ratio
from nmexport.sparsity.mask import keep_mask, scores_of
from torch import nn

if TYPE_CHECKING:
    from typing import Any


def folded_linear(
    linear: nn.Linear,
    behaviour: Behaviour,
    constants: Constants,
    *,
    dtype: torch.dtype | None = None,
) -> SparseLinear:
    """A dense linear folded with its constants; T is its own type unless given."""
    tensors = fold(linear, behaviour, constants, dtype=dtype or linear.weight.dtype)
    return SparseLinear(behaviour, tensors)


class UnfoldedLinear(nn.Module):
    """Correct the input, then apply the dense linear: the shift is added back to what is kept."""

    def __init__(self, linear: nn.Linear, behaviour: Behaviour, constants: Constants) -> None:
        super().__init__()
        self.linear, self.behaviour, self.constants = linear, behaviour, constants

    def forward(self, x: torch.Tensor) -> Any:
        """`[..., K]` -> `[..., O]`, in float32, rounded to the type of x."""
        given = operand = x.to(torch.float32)
        if self._drops(x):
            operand = self._sparsified(given)
        bias = bias_of(self.linear)
        weight = self.linear.weight.to(torch.float32)
        y = nn.functional.linear(operand, weight, None if bias is None else bias.float())
        if self.constants.remainder is not None:
            # What was dropped (and what a correction added) meets the low-rank part of W instead.
            inner, outer = self.constants.remainder.inner, self.constants.remainder.outer
            y = y + (given - operand) @ inner @ outer
        return y.to(x.dtype)

    def _drops(self, x: torch.Tensor) -> bool:
        pattern, phase = self.behaviour.pattern, self.behaviour.phase
        length = x.shape[-2] if x.ndim > 1 else 1
        return pattern.n < pattern.m and (phase == "all" or (length == 1) == (phase == "decode"))

    def _sparsified(self, x: torch.Tensor) -> torch.Tensor:
        constants = self.constants
        eta = x.new_zeros(1) if constants.shift is None else constants.shift
        if self.behaviour.dynamic_shift:
            eta = x.mean(dim=-1, keepdim=True)
        z = x - eta
        scores = scores_of(z, constants.score_scale)
        kept = torch.where(keep_mask(scores, self.behaviour.pattern, constants.channel_order), z, 0)
        nu: torch.Tensor | float = 1.0 if constants.nu is None else constants.nu
        if self.behaviour.variance_correction:
            nu = variance_ratio(z, kept)
        return nu * kept + eta
