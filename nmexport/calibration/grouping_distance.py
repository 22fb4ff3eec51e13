"""How close N:M selection comes to unstructured selection, in score energy that it drops.

Unstructured selection keeps a token's largest scores wherever they are; N:M selection keeps n of
every group. What an order of channels is worth is the share of the difference that it saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.calibration.forward_passes import _hooked, run_samples
from nmexport.sparsity.linear import InputSite
from nmexport.sparsity.mask import keep_mask

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour, Constants
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
        """Over both sets of tokens."""
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


def grouping_distances(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    constants: Mapping[str, Constants],
    behaviours: Mapping[str, Behaviour],
    samples: torch.Tensor,
    *,
    progress: Progress,
    layerwise: LayerwiseModel | None = None,
) -> dict[str, GroupingDistance]:
    """How close each linear's order comes to unstructured selection, on the model's activations.

    Args:
        model: A Hugging Face causal language model in evaluation mode.
        linears: Its linears to look at, by name.
        constants: Their score scale, shift and order, by name.
        behaviours: Their pattern and shift, by name.
        samples: `[samples, length]` int64 token ids.
        progress: Counts samples, or layers.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.
    """
    distances: dict[str, GroupingDistance] = {}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        pattern, order = behaviours[name].pattern, constants[name].channel_order
        site = InputSite(behaviours[name], constants[name], linear.in_features)

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            x = arguments[0].detach()
            distance = grouping_distance(site.to(x.device).scores(x), pattern, order)
            known = distances.get(name)
            distances[name] = distance if known is None else known + distance

        return linear.register_forward_pre_hook(hook)

    with _hooked(watch(name, linear) for name, linear in linears.items()):
        run_samples(
            model,
            samples,
            progress=progress,
            label="fold: distance to unstructured",
            layerwise=layerwise,
        )
    return distances
