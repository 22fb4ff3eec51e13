"""The same selection as `mask`, for many tokens at once: tokens along the vector lanes.

Learning selects millions of groups. Channels are moved to rows first, so that ordering them copies
whole rows, and each comparator of the network works on long vectors; with a channel order that is
several times as fast as gathering single elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.sparsity.mask import keep_mask, nth_largest

if TYPE_CHECKING:
    from nmexport.sparsity.pattern import NMPattern


class LaneSelector:
    """Keep masks of one linear's inputs; equal to `keep_mask`, bit for bit."""

    def __init__(
        self, pattern: NMPattern, channels: int, channel_order: torch.Tensor | None
    ) -> None:
        """Prepare the two row orders.

        Args:
            pattern: N:M; channels is a multiple of M.
            channels: K.
            channel_order: `[K]` integer permutation, or None for consecutive groups.
        """
        order = torch.arange(channels) if channel_order is None else channel_order.long()
        self._pattern = pattern
        self._channel_order = channel_order
        # Row j*G + g holds the j-th channel of group g: a slot of all groups is one block of rows.
        self._to_lanes = order.view(-1, pattern.m).t().reshape(-1)
        self._from_lanes = torch.argsort(self._to_lanes)
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """`[T, K]` float32 scores (see `scores_of`) -> bool `[T, K]`, True where kept."""
        tokens, channels = scores.shape
        n, m = self._pattern.n, self._pattern.m
        if n == m:
            return torch.ones_like(scores, dtype=torch.bool)
        if scores.is_cuda:
            return self.by_rank(scores)
        lanes = scores.t().contiguous().index_select(0, self._to_lanes.to(scores.device))
        slots = lanes.view(m, channels // m * tokens)
        threshold = nth_largest(slots, n)
        reached = (slots >= threshold).view(channels, tokens)
        keep = reached.index_select(0, self._from_lanes.to(scores.device)).t().contiguous()
        # Ties and NaN are rare: only their tokens go the exact way. Minima and maxima hand NaN on,
        # so that it shows in its group's threshold.
        undefined = threshold.view(channels // m, tokens).isnan().any(dim=0)
        unsettled = undefined | (keep.sum(dim=1) != channels // m * n)
        open_tokens = unsettled.nonzero().squeeze(1)
        if open_tokens.numel():
            order = self._channel_order
            order = None if order is None else order.to(scores.device)
            keep[open_tokens] = keep_mask(scores[open_tokens], self._pattern, order)
        return keep

    def by_rank(self, scores: torch.Tensor) -> torch.Tensor:
        """The same by counting, for each channel, how many of its group come before it.

        More comparisons than a network makes, in a few large steps that wait for nothing: what a
        GPU likes. Scores are not negative, so their bits order as they do, NaN last of all.
        """
        n, m = self._pattern.n, self._pattern.m
        order, back = self._rows_on(scores.device)
        bits = scores.masked_fill(scores.isnan(), torch.nan).view(torch.int32)
        groups = bits.index_select(1, order).view(len(bits), -1, m)
        here, there = groups.unsqueeze(-1), groups.unsqueeze(-2)  # [T, G, m, 1], [T, G, 1, m]
        slots = torch.arange(m, device=scores.device)
        earlier = slots.unsqueeze(0) < slots.unsqueeze(1)  # [m, m]: the other one stands before
        ahead = (there > here) | ((there == here) & earlier)
        keep: torch.Tensor = (ahead.sum(dim=-1) < n).flatten(1).index_select(1, back)
        return keep

    def _rows_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels in order of their groups, and the way back; copied to a device once."""
        if self._rows is None or self._rows[0].device != device:
            order = self._to_lanes.view(self._pattern.m, -1).t().reshape(-1)
            self._rows = order.to(device), torch.argsort(order).to(device)
        return self._rows
