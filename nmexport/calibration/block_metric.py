"""Measures how much the model's predictions depend on an error behind each block.

A small error e of the hidden states behind a block changes the predictions by about half of
`E (g e)^2`, where g is the gradient of the log-likelihood of tokens drawn from the predictions
themselves: the Fisher information. A few hundred such gradients stand for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.calibration.sensitivity import drawn_loss
from nmexport.models.backward import backward
from nmexport.store.scratch import scratch_array

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.models.blocks import DecoderBlocks
    from nmexport.progress import Progress

_ROWS = 1024  # gradients kept of each block
# Share of the mean squared gradient that every direction counts beside: those that none of the
# kept gradients has are not free.
_EVERY_DIRECTION = 0.1


class BlockMetrics:
    """Gradients behind every block, in a file."""

    def __init__(self, layers: int, rows: int, width: int, folder: Path | None) -> None:
        """Allocate the file.

        Args:
            layers: Blocks.
            rows: Gradients of each.
            width: H.
            folder: On a disk with room; None is the system's.

        Raises:
            OSError: if the disk has no room.
        """
        self._gradients = torch.from_numpy(scratch_array((layers, rows, width), folder))
        self._gradients.zero_()

    def put(self, layer: int, places: torch.Tensor, gradients: torch.Tensor) -> None:
        """Keep some gradients `[n, H]` of a block."""
        self._gradients[layer, places] = gradients.cpu()

    def of(self, layer: int) -> torch.Tensor:
        """Return `[H, H']`; an error times this, squared and summed, is twice its divergence."""
        gradients = self._gradients[layer].clone()
        rows, width = gradients.shape
        seen = gradients.t() / rows**0.5
        size = (_EVERY_DIRECTION * seen.square().sum() / width).sqrt()
        return torch.cat([seen, size * torch.eye(width)], dim=1)


def gather_metrics(
    blocks: DecoderBlocks,
    samples: torch.Tensor,
    *,
    progress: Progress,
    seed: int,
    folder: Path | None = None,
) -> BlockMetrics:
    """Run the dense model forward and backward over a few samples.

    Gradients are by the state in units of its own size, as the norm that follows sees it.

    Args:
        blocks: The dense model.
        samples: `[samples, length]` int64 token ids.
        progress: Counts layers, there and back.
        seed: Of the drawn tokens, and of which gradients are kept.
        folder: On a disk with room; None is the system's.

    Raises:
        ModelError: if the layers cannot be run one by one.
        OSError: if the disk has no room.
    """
    count, length = samples.shape
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(count * length, generator=generator)[:_ROWS].sort().values
    metrics = BlockMetrics(len(blocks), len(kept), blocks.width, folder)

    def see(layer: int, number: int, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        places = ((kept // length) == number).nonzero().squeeze(1)
        positions = kept[places] % length
        size = hidden[0, positions].square().mean(dim=-1, keepdim=True).sqrt()
        metrics.put(layer, places, gradient[0, positions] * size)

    backward(
        blocks,
        samples,
        lambda logits: drawn_loss(logits, generator),
        progress=progress,
        label="fold: sensitivities of blocks",
        see=see,
    )
    return metrics
