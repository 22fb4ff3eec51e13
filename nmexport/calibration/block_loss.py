"""The loss of one block: how far its output is from the dense block's, for the model's size of it.

What follows a block looks at hidden states through a norm, so that an error counts by its share of
the state; and it depends on some channels far more than on others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEAST_ERROR = 1e-6  # of the squared state: below is rounding
_FLOOR = 1e-12


def relative_errors(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of each position over its squared state: `[...]` float32.

    Args:
        student: `[..., H]` outputs of the sparse block.
        teacher: `[..., H]` outputs of the dense block, without gradient.
        weights: `[H]`, what a channel's squared error counts; None counts all alike.
    """
    error, state = (student.float() - teacher).square(), teacher.square()
    if weights is not None:
        error, state = error * weights, state * weights
    return error.sum(dim=-1) / state.sum(dim=-1).clamp_min(_FLOOR)


def loss_of(errors: torch.Tensor) -> torch.Tensor:
    """Return the objective of learning for relative errors: the mean of their roots."""
    # As with divergences, a few positions that no constant repairs must not rule.
    return errors.clamp_min(_LEAST_ERROR).sqrt().mean()
