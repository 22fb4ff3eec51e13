"""What a sparsified linear makes of its input before the dense weight: the method unfolded.

Linears that share an input share this tensor too, so that trying a choice on a site needs no change
of any module: its linears are handed this in place of their input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.sparsity.lanes import LaneSelector
from nmexport.sparsity.linear import drops_channels, variance_ratio
from nmexport.sparsity.mask import scores_of

if TYPE_CHECKING:
    from nmexport.sparsity.linear import Behaviour, Constants


class SparseInput:
    """`nu * kept + eta` in place of x; see `nmexport.sparsity.linear.SparseLinear`."""

    def __init__(self, behaviour: Behaviour, constants: Constants, channels: int) -> None:
        """Prepare the selection.

        Args:
            behaviour: Pattern, per-token corrections, phase.
            constants: Calibrated constants, the same for all linears of the site.
            channels: K.
        """
        self.behaviour, self.constants = behaviour, constants
        self._select = LaneSelector(behaviour.pattern, channels, constants.channel_order)

    def __call__(self, x: torch.Tensor, *, prompt: int = 0) -> torch.Tensor:
        """`[B, S, K]` -> the same, in the type of x.

        Args:
            x: Inputs of whole sequences.
            prompt: Tokens of each that count as prefill; the rest as decoded one by one. Where
                the phase is `all` it makes no difference.
        """
        pattern, phase = self.behaviour.pattern, self.behaviour.phase
        if not drops_channels(x, pattern, "all"):
            return x
        if phase == "all":
            return self._sparsified(x)
        head, tail = x[:, :prompt], x[:, prompt:]
        if phase == "prefill":
            return torch.cat([self._sparsified(head), tail], dim=1)
        return torch.cat([head, self._sparsified(tail)], dim=1)

    def _sparsified(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1]).float()
        eta = self._eta(tokens)
        z = tokens - eta
        scale = self.constants.score_scale
        kept = z * self._select(scores_of(z, None if scale is None else scale.to(z.device)))
        if self.behaviour.variance_correction:
            kept = variance_ratio(z, kept) * kept
        elif self.constants.nu is not None:
            kept = self.constants.nu * kept
        return (kept + eta).reshape(x.shape).to(x.dtype)

    def _eta(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.behaviour.dynamic_shift:
            return tokens.mean(dim=-1, keepdim=True)
        shift = self.constants.shift
        return tokens.new_zeros(1) if shift is None else shift.to(tokens.device)
