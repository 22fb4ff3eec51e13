"""What a sparsified linear makes of its input before the dense weight: the method unfolded.

Linears that share an input share this tensor too, so that trying a choice on a site needs no change
of any module: its linears are handed this in place of their input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.sparsity.linear import InputSite

if TYPE_CHECKING:
    from nmexport.sparsity.linear import Behaviour, Constants


class SparseInput:
    """`nu * kept + eta` in place of x."""

    def __init__(self, behaviour: Behaviour, constants: Constants, channels: int) -> None:
        """Prepare the selection.

        Args:
            behaviour: Pattern, per-token corrections, phase.
            constants: Calibrated constants, the same for all linears of the site.
            channels: K.
        """
        self.behaviour, self.constants = behaviour, constants
        self._site = InputSite(behaviour, constants, channels)

    def __call__(self, x: torch.Tensor, *, prompt: int = 0) -> torch.Tensor:
        """`[B, S, K]` -> the same, in the type of x.

        Args:
            x: Inputs of whole sequences.
            prompt: Tokens of each that count as prefill; the rest as decoded one by one. Where
                the phase is `all` it makes no difference.
        """
        pattern, phase = self.behaviour.pattern, self.behaviour.phase
        if pattern.n == pattern.m:
            return x
        if phase == "all":
            return self._sparsified(x)
        head, tail = x[:, :prompt], x[:, prompt:]
        if phase == "prefill":
            return torch.cat([self._sparsified(head), tail], dim=1)
        return torch.cat([head, self._sparsified(tail)], dim=1)

    def _sparsified(self, x: torch.Tensor) -> torch.Tensor:
        selected = self._site.to(x.device).select(x)
        kept = selected.tokens - selected.eta
        if selected.keep is not None:
            kept = kept * selected.keep
        nu = self.constants.nu if selected.nu is None else selected.nu
        if nu is not None:
            kept = nu * kept
        return (kept + selected.eta).reshape(x.shape).to(x.dtype)
