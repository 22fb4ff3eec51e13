"""Second moments of what meets a weight: of whole inputs, and of the values that a linear keeps.

Compensated rounding needs them. One of K channels has K * K numbers, so linears are taken a few at
a time, as memory allows, and the samples run once for each few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.calibration.forward_passes import hooked, run_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.progress import Progress

    Operand = Callable[[torch.Tensor], torch.Tensor]
    """From a linear's input `[..., K]` to what meets its weight, `[T, K]` float32."""

MOMENT_BYTES = 2 << 30
"""Second moments that are held at a time."""


@dataclass(frozen=True)
class Watched:
    """Which second moments to collect at one linear's input."""

    linear: str
    """Name of a linear that reads the input."""
    channels: int
    operands: Mapping[str, Operand]
    """By the name of the second moment."""

    @property
    def bytes(self) -> int:
        """Size of its second moments, as float32."""
        return 4 * self.channels * self.channels * len(self.operands)


def split_by_bytes(
    watched: Sequence[Watched], most_bytes: int = MOMENT_BYTES
) -> Iterator[list[Watched]]:
    """Split in order, as many at a time as fit into memory; at least one."""
    chunk: list[Watched] = []
    held = 0
    for item in watched:
        if chunk and held + item.bytes > most_bytes:
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += item.bytes
    if chunk:
        yield chunk


def gather_second_moments(
    model: nn.Module,
    watched: Sequence[Watched],
    samples: torch.Tensor,
    *,
    progress: Progress,
    layerwise: LayerwiseModel | None = None,
) -> dict[str, torch.Tensor]:
    """Run the dense model and add up.

    Args:
        model: A Hugging Face causal language model in evaluation mode.
        watched: Inputs, and what of them.
        samples: `[samples, length]` int64 token ids.
        progress: Counts samples.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.

    Returns:
        `[K, K]` float32 on the CPU by name: the mean of `s^T s` over tokens.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def watch(item: Watched) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            for name, operand in item.operands.items():
                s = operand(arguments[0].detach())
                product = s.t() @ s
                sums[name] = sums[name].add_(product) if name in sums else product
                tokens[name] = tokens.get(name, 0) + len(s)

        return model.get_submodule(item.linear).register_forward_pre_hook(hook)

    with hooked(watch(item) for item in watched):
        run_samples(
            model, samples, progress=progress, label="fold: second moments", layerwise=layerwise
        )
    return {name: (total / tokens[name]).cpu() for name, total in sums.items()}
