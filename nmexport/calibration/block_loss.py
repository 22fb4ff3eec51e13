"""The loss of one block: what its error makes of the predictions, to first order.

What follows a block looks at hidden states through a norm, so that an error counts by its share of
the state; and predictions depend on some directions far more than on others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LEAST_ERROR = 1e-6  # below is rounding
_FLOOR = 1e-12


def relative_errors(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Error of each position in units of its state's size: `[..., H]` float32.

    Args:
        student: `[..., H]` outputs of the sparse block.
        teacher: `[..., H]` outputs of the dense block, without gradient.
    """
    size = teacher.square().mean(dim=-1, keepdim=True).clamp_min(_FLOOR).sqrt()
    return (student.float() - teacher) / size


def divergences_of(errors: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Squares of errors `[..., H]` under a metric `[H, H']`: `[...]`."""
    return (errors @ metric).square().sum(dim=-1)


def loss_of(found: torch.Tensor) -> torch.Tensor:
    """Return the objective of learning: the mean of the roots."""
    # As with divergences, a few positions that no constant repairs must not rule.
    return found.clamp_min(_LEAST_ERROR).sqrt().mean()
