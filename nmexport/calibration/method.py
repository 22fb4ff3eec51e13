"""Reads a recipe's sparsity section: what each linear computes, and with which constants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.sparsity import mitigation
from nmexport.sparsity.criterion import score_scale
from nmexport.sparsity.grouping import channel_order
from nmexport.sparsity.linear import Behaviour, Constants

if TYPE_CHECKING:
    from nmexport.recipe import SparsitySection
    from nmexport.sparsity.statistics import ChannelStatistics


def behaviour_of(section: SparsitySection) -> Behaviour:
    """Return what every target linear of a recipe computes at run time.

    Raises:
        RecipeError: if the mitigations do not go together.
    """
    mitigation.check_combination(section.mitigations, section.phases)
    return Behaviour(
        pattern=section.pattern,
        dynamic_shift=mitigation.uses(section.mitigations, "shift", per_token=True),
        variance_correction=mitigation.uses(section.mitigations, "variance", per_token=True),
        phase=section.phases,
    )


def constants_of(
    section: SparsitySection,
    weight: torch.Tensor,
    statistics: ChannelStatistics,
    *,
    nu: float | None = None,
    seed: int = 0,
) -> Constants:
    """Build the constants of one linear.

    Args:
        section: The recipe's sparsity section.
        weight: `[O, K]`.
        statistics: Of the linear's input.
        nu: Calibrated static variance correction, where `s-var` is used.
        seed: Of the grouping; the same for all linears, so that linears that share an input and
            a score share their masks.
    """
    scale = score_scale(section.criterion, weight, statistics)
    mean_score = statistics.mean_magnitude
    if scale is not None:
        scale = scale.cpu()  # beside the statistics, wherever the weight is
        mean_score = mean_score * scale.double()
    return Constants(
        score_scale=scale,
        channel_order=channel_order(section.grouping, mean_score, section.pattern, seed=seed),
        shift=_static_shift(section, statistics),
        nu=nu,
    )


def needs_static_variance(section: SparsitySection) -> bool:
    """Tell whether `nu` has to be calibrated."""
    return mitigation.uses(section.mitigations, "variance", per_token=False)


def _static_shift(section: SparsitySection, statistics: ChannelStatistics) -> torch.Tensor | None:
    """S-PTS: the mean over all channels and calibration tokens, `[1]` float32."""
    if not mitigation.uses(section.mitigations, "shift", per_token=False):
        return None
    return statistics.mean.mean().reshape(1).to(torch.float32)
