"""The losses of learning: of the whole model, and of one block.

The whole model's is how far its next-token distributions are from the dense model's. A block's is
what its error makes of the predictions, to first order: what follows looks at hidden states through
a norm, so that an error counts by its share of the state, and in some directions far more than in
others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from nmexport.calibration.output_head import OutputHead

_LEAST_DIVERGENCE = 1e-6  # nats a token
_LEAST_ERROR = 1e-6  # of a block; below is rounding
_FLOOR = 1e-12
_LOSS_ROWS = 256  # positions whose logits the loss looks at together


def divergences(student: torch.Tensor, teacher: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """Compute KL(teacher || student) of each position `[T]`, over the head's tokens.

    Args:
        student: `[T, H]` hidden states.
        teacher: `[T, H]`, without gradient.
        head: Of the tokens that are looked at.
    """
    with torch.no_grad():
        target = torch.log_softmax(head.logits(teacher), dim=-1)
    predicted = torch.log_softmax(head.logits(student), dim=-1)
    return nn.functional.kl_div(predicted, target, log_target=True, reduction="none").sum(dim=-1)


def loss_of(divergence: torch.Tensor) -> torch.Tensor:
    """Return the objective of learning for divergences `[T]`: the sum of their roots."""
    # A root's slope has no end at zero; below the floor there is nothing to learn.
    return divergence.clamp_min(_LEAST_DIVERGENCE).sqrt().sum()


def divergence_with_gradient(
    student: torch.Tensor, teacher: torch.Tensor, head: OutputHead
) -> tuple[float, torch.Tensor]:
    """Return the mean divergence and the loss's gradient `[T, H]`, a few positions at a time.

    Logits of all positions together are the largest tensors of a step, and memory that goes back
    to the system in every step has to be got from it again, page by page.
    """
    total, gradients = 0.0, []
    pieces = (torch.split(logits, _LOSS_ROWS) for logits in (student, teacher))
    for rows, targets in zip(*pieces, strict=True):
        leaf = rows.requires_grad_()
        divergence = divergences(leaf, targets, head)
        gradients += torch.autograd.grad(loss_of(divergence) / len(student), leaf)
        total += float(divergence.detach().sum())
    return total / len(student), torch.cat(gradients)


def relative_errors(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Measure the error of each position in units of its state's size: `[..., H]` float32.

    Args:
        student: `[..., H]` outputs of the sparse block.
        teacher: `[..., H]` outputs of the dense block, without gradient.
    """
    size = teacher.square().mean(dim=-1, keepdim=True).clamp_min(_FLOOR).sqrt()
    return (student.float() - teacher) / size


def divergences_of(errors: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Square errors `[..., H]` under a metric `[H, H']`: `[...]`."""
    return (errors @ metric).square().sum(dim=-1)


def block_loss_of(divergence: torch.Tensor) -> torch.Tensor:
    """Return the objective of one block for divergences `[...]`: the mean of their roots."""
    # As with divergences, a few positions that no constant repairs must not rule.
    return divergence.clamp_min(_LEAST_ERROR).sqrt().mean()
