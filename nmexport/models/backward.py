"""Gradients of a loss through a model whose layers are run one by one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from nmexport.models.blocks import DecoderBlocks
    from nmexport.progress import Progress

    Loss = Callable[[torch.Tensor], torch.Tensor]
    See = Callable[[int, int, torch.Tensor, torch.Tensor], None]


def backward(
    blocks: DecoderBlocks,
    samples: torch.Tensor,
    loss_of: Loss,
    *,
    progress: Progress,
    label: str,
    see: See = lambda *_: None,
) -> None:
    """Let gradients of a loss flow back through all layers, for hooks on tensors to see.

    Hidden states before every layer wait in files, and each layer runs once more on its way back.
    No parameter needs a gradient meanwhile.

    Args:
        blocks: The model.
        samples: `[samples, length]` int64 token ids.
        loss_of: The loss of one sample's logits `[length, V]`, called in order of samples.
        progress: Counts layers, there and back.
        label: What it counts them under.
        see: Given layer, sample, hidden states `[1, L, H]` behind the layer and the gradient there.

    Raises:
        ModelError: as `DecoderBlocks.run`.
        OSError: if the disk has no room for the hidden states.
    """
    with frozen(blocks.model):
        passes = _there_and_back(blocks, samples, loss_of, see)
        for _ in progress.track(passes, label=label, total=2 * len(blocks)):
            pass


def _there_and_back(
    blocks: DecoderBlocks, samples: torch.Tensor, loss_of: Loss, see: See
) -> Iterator[None]:
    """Do the work; yield after each layer."""
    states = [blocks.states(samples) for _ in range(len(blocks) + 1)]
    with torch.no_grad():
        calls = blocks.embed(samples, states[0])
        for block in blocks.blocks(calls):
            for number in range(len(samples)):
                states[block.index + 1][number] = block(states[block.index][number])
            yield
    behind, gradients = states.pop(), blocks.states(samples)
    with torch.enable_grad():
        for number, final, logits in blocks.logits(behind, range(len(samples)), kept=0):
            loss_of(logits).backward()  # type: ignore[no-untyped-call]
            gradients[number] = _gradient(final)
        for index in reversed(range(len(blocks))):
            for number in range(len(samples)):
                see(index, number, behind[number], gradients[number])
            before = behind = states.pop()
            with blocks.block(index, calls[index]) as block:
                for number in range(len(samples)):
                    leaf = before[number].to(blocks.device).requires_grad_()
                    block(leaf).backward(gradients[number].to(blocks.device))  # type: ignore[no-untyped-call]
                    gradients[number] = _gradient(leaf)
            yield


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Freeze all parameters of a module, those loaded meanwhile too."""
    needed = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name in needed:
        module.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in needed:
            module.get_parameter(name).requires_grad_(True)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """Return what has arrived at a tensor; zero where nothing depends on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
