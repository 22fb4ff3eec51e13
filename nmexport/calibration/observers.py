"""Streaming observers, whose memory does not grow with the tokens they see.

Two observers of disjoint tokens merge into one of all of them, in any order; sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nmexport.sparsity.statistics import ChannelStatistics

# Tokens that are wide at once: a wide copy of them all leaves the processor's caches, and so would
# more than one copy of a block. A GPU waits for the launches of small blocks.
_BLOCK = 64
_DEVICE_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class ChannelSums:
    """Sums over tokens of one linear's input, channel by channel: `[K]` float64 each."""

    tokens: int
    total: torch.Tensor
    squares: torch.Tensor
    magnitudes: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> ChannelSums:
        """Sum a batch of inputs `[..., K]` of any floating type."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        sums = torch.zeros(3, tokens.shape[1], dtype=torch.float64, device=tokens.device)
        for block in torch.split(tokens, _DEVICE_BLOCK if tokens.is_cuda else _BLOCK):
            wide = block.to(torch.float64, copy=True)
            sums[0] += wide.sum(dim=0)
            sums[2] += wide.abs_().sum(dim=0)
            sums[1] += wide.mul_(wide).sum(dim=0)
        total, squares, magnitudes = sums.cpu()
        return cls(tokens=tokens.shape[0], total=total, squares=squares, magnitudes=magnitudes)

    def __add__(self, other: ChannelSums) -> ChannelSums:
        """Add two sets of tokens."""
        return ChannelSums(
            tokens=self.tokens + other.tokens,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            magnitudes=self.magnitudes + other.magnitudes,
        )


@dataclass
class ChannelObserver:
    """Gathers channel statistics of one linear's input."""

    sums: ChannelSums | None = None

    def update(self, sums: ChannelSums) -> None:
        """Add tokens."""
        self.sums = sums if self.sums is None else self.sums + sums

    def merge(self, other: ChannelObserver) -> None:
        """Add what another observer saw."""
        if other.sums is not None:
            self.update(other.sums)

    def statistics(self) -> ChannelStatistics | None:
        """Statistics of the tokens seen, or None if there were none."""
        if self.sums is None or self.sums.tokens == 0:
            return None
        return ChannelStatistics(
            tokens=self.sums.tokens,
            mean=self.sums.total / self.sums.tokens,
            rms=(self.sums.squares / self.sums.tokens).sqrt(),
            mean_magnitude=self.sums.magnitudes / self.sums.tokens,
        )
