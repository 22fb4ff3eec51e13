"""Which channels of a token are kept: the selection rule of the op contract, exact and fast.

Only the n-th largest score of each group is looked for, by a sorting network whose lanes are whole
columns of groups (plain vector minima and maxima, about eight times as fast as a sort of many short
rows). Everything above that threshold is kept; equal scores at the threshold are resolved by
position, and only where there are any.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nmexport.sparsity.pattern import NMPattern

# Above the bits of +inf (0x7F800000): NaN ranks above everything, and all NaNs are equal.
_NAN_KEY = 0x7FFFFFFF


def scores_of(x: torch.Tensor, score_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Scores that rank channels within their group: `|float32(x)|`, times a per-channel scale.

    Args:
        x: `[..., K]`, any floating type.
        score_scale: `[K]` float32, or None for plain magnitude.

    Returns:
        `[..., K]` float32.
    """
    magnitude = x.to(torch.float32).abs()
    return magnitude if score_scale is None else magnitude * score_scale


def keep_mask(
    scores: torch.Tensor, pattern: NMPattern, channel_order: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep the `n` largest scores of every group of `m`.

    Of equal scores the one earlier in the group is kept first; NaN ranks above everything.

    Args:
        scores: `[..., K]`, non-negative or NaN (see `scores_of`); half types are upcast.
        pattern: N:M; K is a multiple of M.
        channel_order: `[K]` integer permutation: group g holds `channel_order[g*m : g*m+m]`.
            None groups consecutive channels.

    Returns:
        `[..., K]` bool in the scores' own channel order, True where kept.
    """
    ordered = scores if channel_order is None else scores[..., channel_order.long()]
    groups = ordered.to(torch.float32).reshape(*ordered.shape[:-1], -1, pattern.m)
    keep = _keep_in_groups(_ranking_keys(groups), pattern).flatten(-2)
    if channel_order is None:
        return keep
    return keep[..., torch.argsort(channel_order.long())]


def _ranking_keys(scores: torch.Tensor) -> torch.Tensor:
    """Integers in the order of non-negative float32 scores, NaN last: IEEE bits are monotonic."""
    # Adding zero turns -0 into +0, whose bits differ.
    bits = (scores + 0.0).contiguous().view(torch.int32)
    return torch.where(torch.isnan(scores), _NAN_KEY, bits)


def _keep_in_groups(keys: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """`[..., G, m]` int32 -> bool; exactly n True in each group."""
    if pattern.n == pattern.m:
        return torch.ones_like(keys, dtype=torch.bool)
    threshold = _nth_largest(keys, pattern.n).unsqueeze(-1)  # [..., G, 1]
    reached = keys >= threshold
    if int(torch.count_nonzero(reached)) == reached.numel() // pattern.m * pattern.n:
        return reached  # no group has a tie that matters
    above = keys > threshold
    tied = reached & ~above
    vacancies = pattern.n - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= vacancies))


def _nth_largest(keys: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of the last axis: `[..., m]` -> `[...]`."""
    slots = keys.reshape(-1, keys.shape[-1]).t().contiguous()
    return nth_largest(slots, n).view(keys.shape[:-1])


def nth_largest(slots: torch.Tensor, n: int) -> torch.Tensor:
    """The n-th largest of the first axis: `[m, L]` -> `[L]`."""
    m = slots.shape[0]
    lanes = list(slots.unbind(0))
    for low, high, keep_low, keep_high in _selection_network(m, m - n):
        a, b = lanes[low], lanes[high]
        if keep_low:
            lanes[low] = torch.minimum(a, b)
        if keep_high:
            lanes[high] = torch.maximum(a, b)
    return lanes[m - n]


@functools.cache
def _selection_network(m: int, rank: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Comparators that bring the ascending `rank` of m lanes to lane `rank`, in order.

    Batcher's odd-even merge sort, pruned backwards to what that one lane depends on.

    Returns:
        `(low lane, high lane, whether the minimum is used, whether the maximum is)`.
    """
    live = {rank}
    needed: list[tuple[int, int, bool, bool]] = []
    for low, high in reversed(_odd_even_merge_sort(m)):
        if low in live or high in live:
            needed.append((low, high, low in live, high in live))
            live |= {low, high}
    return tuple(reversed(needed))


def _odd_even_merge_sort(m: int) -> list[tuple[int, int]]:
    """Comparators that sort m lanes ascending (Batcher 1968), m not only a power of two."""
    comparators: list[tuple[int, int]] = []
    run = 1
    while run < m:
        stride = run
        while stride >= 1:
            for start in range(stride % run, m - stride, 2 * stride):
                comparators += [
                    (lane, lane + stride)
                    for lane in range(start, min(start + stride, m - stride))
                    if lane // (2 * run) == (lane + stride) // (2 * run)
                ]
            stride //= 2
        run *= 2
    return comparators
