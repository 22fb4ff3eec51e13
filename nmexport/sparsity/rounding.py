"""Round a weight to few bits: scales by search, and errors made good by later channels.

A scale is chosen among a few shares of what the largest weight would need, by the squared error of
the rounded weight, each channel counted by how strong its input is. A share below one cuts off the
largest weights and is finer for all others.

Compensation is GPTQ's (arXiv 2210.17323): channel by channel, what rounding does to the product is
taken out of the channels that are not rounded yet, as far as their inputs go together. Whose inputs
are the kept values of a sparse linear sees what that linear sees, dropped channels as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from nmexport.sparsity.quantisation import VALUE_RANGES, QuantisedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.sparsity.weight_form import StoredType, WeightForm

_DAMPING = 0.01
"""Share of the mean second moment that is added to every channel's own."""
_BLOCK = 64
"""Channels after which errors are taken out of all later ones at once; those of a block go to each
other directly. No result depends on it."""
_LEAST_SCALE = 1e-12
# Finer than this, or further down, no scale is found that is worth its time.
_SHARES_OF_8_BITS = (1.0, 0.96, 0.92)
_SHARES_OF_4_BITS = tuple(1.0 - 0.05 * step for step in range(9))


@dataclass(frozen=True)
class Grid:
    """The values of a stored type, and how scales are looked for."""

    type: StoredType
    shares: tuple[float, ...]
    """Of the scale that the largest weight needs."""
    has_zero_point: bool = False

    @property
    def least(self) -> int:
        """The lowest value in use: as far from zero as the highest, where there are many."""
        low, high = VALUE_RANGES[self.type]
        return -high if self.type == "int8" else low

    @property
    def most(self) -> int:
        """The highest value."""
        return VALUE_RANGES[self.type][1]


GRIDS = {
    "int8": Grid("int8", _SHARES_OF_8_BITS),
    "int4": Grid("int4", _SHARES_OF_4_BITS),
    "uint4": Grid("uint4", _SHARES_OF_4_BITS, has_zero_point=True),
}


class Scales(NamedTuple):
    """Scale and zero point of groups of channels: `[G, O]` float32 each; no zero point is None."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scales:
        """Change both alike."""
        point = self.zero_point
        return Scales(change(self.scale), None if point is None else change(point))

    def of(self, group: int) -> Scales:
        """Those of one group: `[O]`."""
        return self.each(lambda part: part[group])

    def where(self, better: torch.Tensor, other: Scales) -> Scales:
        """Those of another where it is better; both have zero points, or none has."""
        points = (self.zero_point, other.zero_point)
        return Scales(
            torch.where(better, other.scale, self.scale),
            None
            if points[0] is None or points[1] is None
            else torch.where(better, points[1], points[0]),
        )


def levels_of(weight: torch.Tensor, scales: Scales, grid: Grid) -> torch.Tensor:
    """Round weights to values of the grid, float32; scales broadcast against them."""
    levels = (weight / scales.scale).round()
    if scales.zero_point is not None:
        levels = levels + scales.zero_point
    return levels.clamp(grid.least, grid.most)


def meant(levels: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Return the weights that values of the grid stand for."""
    if scales.zero_point is not None:
        levels = levels - scales.zero_point
    return levels * scales.scale


def search_scales(
    weight: torch.Tensor, groups: int, grid: Grid, importance: torch.Tensor
) -> Scales:
    """Find scales of the least squared error.

    Args:
        weight: `[K, O]` float32.
        groups: G, scales of each output.
        grid: What weights are rounded to.
        importance: `[K]` float32, second moment of each channel's input.
    """
    grouped = weight.reshape(groups, -1, weight.shape[1])
    counted = importance.clamp_min(importance.mean() * 1e-6 + _LEAST_SCALE).reshape(groups, -1, 1)
    best: Scales | None = None
    best_error = torch.empty(0)
    for candidate in _candidates(grouped, grid):
        spread = candidate.each(lambda part: part.unsqueeze(1))
        error = meant(levels_of(grouped, spread, grid), spread).sub_(grouped).square_()
        error = error.mul_(counted).sum(dim=1)
        if best is None:
            best, best_error = candidate, error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = best.where(better, candidate)
    if best is None:
        raise ValueError("a grid without shares has no scales")
    return best


def _candidates(grouped: torch.Tensor, grid: Grid) -> list[Scales]:
    """Scales `[G, O]` to choose among, of weights `[G, K / G, O]`; zeros have some too."""
    highest, lowest = grouped.amax(dim=1), grouped.amin(dim=1)
    if grid.has_zero_point:
        highest, lowest = highest.clamp_min(0.0), lowest.clamp_max(0.0)
        span = ((highest - lowest) / (grid.most - grid.least)).clamp_min(_LEAST_SCALE)
        found = []
        for share in grid.shares:
            scale = share * span
            point = (grid.least - lowest * share / scale).round()
            found.append(Scales(scale, point.clamp(grid.least, grid.most)))
        return found
    if -grid.least == grid.most:
        full = (torch.maximum(highest, -lowest) / grid.most).clamp_min(_LEAST_SCALE)
        return [Scales(share * full, None) for share in grid.shares]
    # One value more below zero: it goes to the side of the larger weight, by the scale's sign.
    positive = torch.maximum(highest / grid.most, lowest / grid.least).clamp_min(_LEAST_SCALE)
    negative = torch.maximum(highest / -grid.least, -lowest / grid.most).clamp_min(_LEAST_SCALE)
    return [Scales(share * full, None) for share in grid.shares for full in (positive, -negative)]


def round_weight(
    weight: torch.Tensor, groups: int, grid: Grid, importance: torch.Tensor
) -> tuple[torch.Tensor, Scales]:
    """Round every weight to what is nearest.

    Args:
        weight: `[K, O]` float32.
        groups: G.
        grid: What weights are rounded to.
        importance: `[K]` float32, for the scales.

    Returns:
        Values `[K, O]` float32, and their scales.
    """
    scales = search_scales(weight, groups, grid, importance)
    rows = weight.shape[0] // groups
    spread = scales.each(lambda part: part.repeat_interleave(rows, dim=0))
    return levels_of(weight, spread, grid), scales


def round_compensated(
    weight: torch.Tensor, groups: int, grid: Grid, second_moment: torch.Tensor
) -> tuple[torch.Tensor, Scales]:
    """Round channel by channel, each error taken out of the channels that follow.

    Args:
        weight: `[K, O]` float32.
        groups: G.
        grid: What weights are rounded to.
        second_moment: `[K, K]`, mean of `s^T s` over the inputs that meet the weight.

    Returns:
        Values `[K, O]` float32, and their scales.
    """
    channels, outputs = weight.shape
    importance = second_moment.diagonal().float()
    factor = _error_factor(second_moment)
    left = weight.clone()
    levels = torch.empty_like(left)
    rows = channels // groups
    whole = search_scales(weight, 1, grid, importance) if groups == 1 else None
    found: list[Scales] = []
    for start in range(0, channels, _BLOCK):
        end = min(start + _BLOCK, channels)
        errors = torch.zeros(end - start, outputs)
        for k in range(start, end):
            if whole is None and k % rows == 0:
                # Errors of the block's earlier channels have yet to reach those behind the block.
                group = left[k : k + rows].clone()
                if k + rows > end:
                    group[end - k :] -= factor[start:k, end : k + rows].T @ errors[: k - start]
                found.append(search_scales(group, 1, grid, importance[k : k + rows]))
            scales = (whole or found[-1]).of(0)
            levels[k] = levels_of(left[k], scales, grid)
            error = (left[k] - meant(levels[k], scales)) / factor[k, k]
            left[k + 1 : end] -= factor[k, k + 1 : end].unsqueeze(1) * error
            errors[k - start] = error
        left[end:] -= factor[start:end, end:].T @ errors
    return levels, whole or _joined(found)


def _joined(found: list[Scales]) -> Scales:
    points = [scales.zero_point for scales in found if scales.zero_point is not None]
    return Scales(
        torch.cat([scales.scale for scales in found]), torch.cat(points) if points else None
    )


def _error_factor(second_moment: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of the damped second moment, `[K, K]` float32."""
    damped = second_moment.double()
    own = damped.diagonal()
    # A channel that is never met may become anything: it follows no other.
    damped = damped + torch.diag(_DAMPING * own.mean() + torch.where(own > 0, 0.0, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def quantised(
    weight: torch.Tensor,
    form: WeightForm,
    *,
    importance: torch.Tensor | None = None,
    second_moment: torch.Tensor | None = None,
    name: str,
) -> QuantisedWeight:
    """Store a weight in integers.

    Args:
        weight: `[K, O]` float32, in gathered order.
        form: What it is stored in.
        importance: `[K]`, second moment of each channel; None counts all alike.
        second_moment: `[K, K]` of what meets the weight: errors are compensated. None rounds each
            weight to what is nearest.
        name: Of the linear, for the message.

    Raises:
        RecipeError: if the form's groups do not divide K.
    """
    channels, outputs = weight.shape
    groups = form.groups(channels, name=name)
    # Four bits lie two a byte along the outputs.
    grid = GRIDS[form.type if form.type == "int8" or outputs % 2 == 0 else "int8"]
    if second_moment is not None:
        levels, scales = round_compensated(weight, groups, grid, second_moment)
    else:
        counted = torch.ones(channels) if importance is None else importance
        levels, scales = round_weight(weight, groups, grid, counted)
    point = scales.zero_point
    return QuantisedWeight(
        values=levels.to(torch.int8),
        scale=scales.scale.contiguous(),
        type=grid.type,
        zero_point=None if point is None else point.to(torch.int8),
    )
