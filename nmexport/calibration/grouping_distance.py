"""How close N:M selection comes to unstructured selection, in score energy that it drops.

Unstructured selection keeps a token's largest scores wherever they are; N:M selection keeps n of
every group. What an order of channels is worth is the share of the difference that it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.calibration.forward_passes import hooked
from nmexport.sparsity.linear import InputSite
from nmexport.sparsity.mask import keep_mask

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.calibration.forward_passes import DenseRun
    from nmexport.sparsity.pattern import NMPattern


@dataclass(frozen=True, kw_only=True)
class GroupingDistance:
    """Score energy that selection drops of a linear's input: squares of scores, summed."""

    total: float
    consecutive: float
    ordered: float
    unstructured: float

    def closed(self) -> float | None:
        """Share of the distance from consecutive groups to unstructured that the order closes."""
        gap = self.consecutive - self.unstructured
        return None if gap <= 0 else (self.consecutive - self.ordered) / gap

    def __add__(self, other: GroupingDistance) -> GroupingDistance:
        """Add two sets of tokens."""
        return GroupingDistance(
            total=self.total + other.total,
            consecutive=self.consecutive + other.consecutive,
            ordered=self.ordered + other.ordered,
            unstructured=self.unstructured + other.unstructured,
        )


def grouping_distance(
    scores: torch.Tensor, pattern: NMPattern, channel_order: torch.Tensor | None
) -> GroupingDistance:
    """Sum the scores `[T, K]` that N:M selection drops, and those that unstructured one does."""
    squares = scores.double().square()
    channels = squares.shape[-1]
    dropped = min(max(channels - round(channels * pattern.density), 1), channels)
    threshold = squares.kthvalue(dropped, dim=-1, keepdim=True).values

    def under(order: torch.Tensor | None) -> float:
        keep = keep_mask(scores, pattern, order)
        return float(squares.masked_fill(keep, 0.0).sum())

    return GroupingDistance(
        total=float(squares.sum()),
        consecutive=under(None),
        ordered=under(channel_order),
        unstructured=float((squares * (squares <= threshold)).sum()),
    )


def grouping_distances(run: DenseRun) -> dict[str, GroupingDistance]:
    """Measure how close each linear's order comes to unstructured selection."""
    distances: dict[str, GroupingDistance] = {}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        behaviour, constants = run.behaviours[name], run.constants[name]
        site = InputSite(behaviour, constants, linear.in_features)

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            x = arguments[0].detach()
            distance = grouping_distance(
                site.to(x.device).scores(x), behaviour.pattern, constants.channel_order
            )
            known = distances.get(name)
            distances[name] = distance if known is None else known + distance

        return linear.register_forward_pre_hook(hook)

    with hooked(watch(name, linear) for name, linear in run.linears.items()):
        run.forward("fold: distance to unstructured")
    return distances
