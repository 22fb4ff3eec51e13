"""Calibration statistics of one linear's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Statistics of each input channel over all calibration tokens."""

    tokens: int
    """Tokens they stand on."""
    mean: torch.Tensor
    """`[K]` float64."""
    rms: torch.Tensor
    """`[K]` float64, square root of the second moment."""
    mean_magnitude: torch.Tensor
    """`[K]` float64, mean of |x|."""
    sensitivity: torch.Tensor | None = None
    """`[K]` float64, root mean square gradient of the predictions; None was not measured."""
