"""Criteria: how channels are ranked, as one constant per channel that multiplies |x|.

A criterion may use the weight and calibrated statistics, never the tokens of the running batch:
then a token's mask would depend on its neighbours. What a criterion needs is asked before anything
runs, so torch is not imported with this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from nmexport.sparsity.statistics import ChannelStatistics

ScaleRule = Callable[["torch.Tensor", "ChannelStatistics | None"], "torch.Tensor | None"]

# Amber Pruner (arXiv 2508.02128): outliers of W stay out of its mean and deviation.
_AMBER_QUANTILES = (0.005, 0.995)


@dataclass(frozen=True)
class Criterion:
    """One way to rank channels."""

    name: str
    needs: frozenset[str]
    """Fields of ChannelStatistics that it uses."""
    rule: ScaleRule
    """(weight `[O, K]`, statistics) -> `[K]`, or None for plain magnitude."""


def score_scale(
    criterion: str, weight: torch.Tensor, statistics: ChannelStatistics | None = None
) -> torch.Tensor | None:
    """The factor `score_scale` of the op contract.

    Args:
        criterion: A name among CRITERIA.
        weight: `[O, K]`, the dense linear's weight.
        statistics: Of the linear's input; None is enough where the criterion `needs` nothing.

    Returns:
        `[K]` float32, or None for plain magnitude.

    Raises:
        ValueError: if the criterion needs statistics and there are none.
    """
    chosen = CRITERIA[criterion]
    if any(getattr(statistics, field, None) is None for field in chosen.needs):
        raise ValueError(f"criterion {criterion} needs calibrated {sorted(chosen.needs)}")
    scale = chosen.rule(weight.detach().float(), statistics)
    return None if scale is None else scale.float().contiguous()


def _magnitude(weight: torch.Tensor, statistics: ChannelStatistics | None) -> None:
    """ACT: |x| alone."""
    del weight, statistics


def _weight_norm(weight: torch.Tensor, statistics: ChannelStatistics | None) -> torch.Tensor:
    """WINA (arXiv 2505.19427): norm of the weights that channel j meets."""
    import torch

    del statistics
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=0)
    return norms


def _channel_rms(weight: torch.Tensor, statistics: ChannelStatistics | None) -> torch.Tensor:
    """CLACT (arXiv 2509.22166), its cross-token norm frozen at calibration."""
    del weight
    assert statistics is not None  # noqa: S101 - score_scale refused it
    return statistics.rms


def _standardised_norm(weight: torch.Tensor, statistics: ChannelStatistics | None) -> torch.Tensor:
    """Amber: norm of the standardised weights that channel j meets, over the smallest such norm."""
    import torch

    del statistics
    low, high = np.quantile(weight.cpu().numpy(), _AMBER_QUANTILES)
    inside = weight[(weight >= float(low)) & (weight <= float(high))].double()
    standardised = (weight.double() - inside.mean()) / inside.std(correction=0)
    norms: torch.Tensor = torch.linalg.vector_norm(standardised, dim=0)
    return norms / norms.min()


def _fisher(weight: torch.Tensor, statistics: ChannelStatistics | None) -> torch.Tensor:
    """How much predictions depend on the channel: square root of its rms gradient, mean 1.

    The diagonal of the Fisher information to the power 1/4: between magnitude (power 0) and what
    dropping a channel would change by first-order theory (1/2); the best of several powers.
    """
    del weight
    assert statistics is not None  # noqa: S101 - score_scale refused it
    assert statistics.sensitivity is not None  # noqa: S101 - as above
    roots = statistics.sensitivity.sqrt()
    return roots / roots.mean().clamp_min(float(np.finfo(np.float32).tiny))


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        criterion.name: criterion
        for criterion in (
            Criterion("act", frozenset(), _magnitude),
            Criterion("wina", frozenset(), _weight_norm),
            Criterion("clact", frozenset({"rms"}), _channel_rms),
            Criterion("amber", frozenset(), _standardised_norm),
            Criterion("fisher", frozenset({"sensitivity"}), _fisher),
        )
    }
)
