"""Derives the constants of every linear from statistics, site by site, before learning.

Linears that read the same tensor get the same score scale, channel order and shift, so that an
executor can run them as one op: a criterion that looks at the weight sees those of the site side by
side.
"""

from __future__ import annotations

import contextlib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.method import behaviour_of, constants_of
from nmexport.calibration.sensitivity import gather_sensitivities
from nmexport.calibration.sites import concatenated_weight
from nmexport.calibration.stored_orders import order_for
from nmexport.errors import ModelError
from nmexport.sparsity.criterion import CRITERIA
from nmexport.sparsity.remainder import rank_within, remainder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import nn

    from nmexport.calibration.sites import Site
    from nmexport.calibration.stored_orders import Integers
    from nmexport.models.blocks import DecoderBlocks
    from nmexport.progress import Progress
    from nmexport.recipe import SparsitySection
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.statistics import ChannelStatistics

    Loaded = Callable[[nn.Linear], contextlib.AbstractContextManager[nn.Linear]]


@dataclass(frozen=True)
class Derived:
    """Behaviour and constants of one linear."""

    section: SparsitySection
    """The recipe's, with this linear's pattern, criterion and phases."""
    behaviour: Behaviour
    constants: Constants


def with_sensitivities(
    model: Any,
    sites: Sequence[Site],
    linears: Mapping[str, nn.Linear],
    statistics: Mapping[str, ChannelStatistics],
    samples: torch.Tensor,
    *,
    criteria: Collection[str],
    progress: Progress,
    seed: int = 0,
    layerwise: DecoderBlocks | None = None,
) -> dict[str, ChannelStatistics]:
    """Add the sensitivity of each channel to the statistics, where a criterion needs it.

    Args:
        model: The dense model, in evaluation mode.
        sites: Which linears share an input: its gradient is what comes back from all of them.
        linears: Linears to measure, by name.
        statistics: Of their inputs.
        samples: `[samples, length]` int64 token ids.
        criteria: Names of those in use.
        progress: Counts samples.
        seed: Of the tokens drawn from the model's predictions.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.

    Raises:
        ModelError: if no prediction depends on a linear.
    """
    if not any("sensitivity" in CRITERIA[name].needs for name in criteria):
        return dict(statistics)
    gathered = gather_sensitivities(
        model, linears, samples, progress=progress, seed=seed, layerwise=layerwise
    )
    whole = dict(statistics)
    for site in sites:
        reached = [gathered[name].square() for name in site.names if name in gathered]
        if not reached:
            raise _insensitive(site.names[0], len(samples))
        squares = torch.stack(reached).sum(dim=0)
        for name in site.names:
            whole[name] = replace(statistics[name], sensitivity=squares.sqrt())
    return whole


def _insensitive(name: str, samples: int) -> ModelError:
    return ModelError(
        f"No prediction on the first {samples} calibration samples depends on {name}, so criterion "
        "fisher cannot rank its channels.",
        allowed="linears that those samples reach (an expert may be too rare)",
        fix=f"--criterion act, more tokens a sample with --calib-length, or --targets '!{name}'",
    )


def derive(
    sites: Sequence[Site],
    linears: Mapping[str, nn.Linear],
    statistics: Mapping[str, ChannelStatistics],
    sections: Mapping[str, SparsitySection],
    *,
    seed: int,
    loaded: Loaded = nullcontext,
    integers: Integers | None = None,
) -> dict[str, Derived]:
    """Derive the constants of every linear that has a section; the others stay dense.

    Args:
        sites: Which linears share an input; those of one have equal sections.
        linears: By name.
        statistics: Of their inputs.
        sections: What each linear is to compute, by name.
        seed: Of the groupings.
        loaded: Holds a linear's weight in memory, where it is not there all the time.
        integers: Weights that came quantised, whose scale groups an order leaves whole.
    """
    derived: dict[str, Derived] = {}
    for site in sites:
        first = site.names[0]
        if first not in sections:
            continue
        constants = site_constants(
            site,
            linears,
            statistics,
            sections[first],
            seed=seed,
            loaded=loaded,
            integers=integers,
        )
        behaviour = behaviour_of(sections[first])
        for name in site.names:
            derived[name] = Derived(sections[name], behaviour, constants)
    return {name: derived[name] for name in linears if name in derived}


def site_constants(
    site: Site,
    linears: Mapping[str, nn.Linear],
    statistics: Mapping[str, ChannelStatistics],
    section: SparsitySection,
    *,
    seed: int,
    loaded: Loaded = nullcontext,
    integers: Integers | None = None,
) -> Constants:
    """Derive the constants that a site's linears share under a section; see `derive`."""
    with contextlib.ExitStack() as stack:
        held = {name: stack.enter_context(loaded(linears[name])) for name in site.names}
        weight = concatenated_weight(site, held)
        constants = constants_of(section, weight, statistics[site.names[0]], seed=seed)
    if integers is None:
        return constants
    order = order_for(site, constants.channel_order, integers)
    return replace(constants, channel_order=order)


def with_remainders(
    derived: Mapping[str, Derived],
    linears: Mapping[str, nn.Linear],
    *,
    seed: int,
    loaded: Loaded = nullcontext,
) -> dict[str, Derived]:
    """Add the low-rank factors of `r-sparse`, where a linear's section names it."""
    changed = dict(derived)
    for name, linear_derived in derived.items():
        if "r-sparse" in linear_derived.section.mitigations:
            linear = linears[name]
            rank = rank_within(
                linear_derived.section.remainder, linear.in_features, linear.out_features
            )
            with loaded(linear) as held:
                factors = remainder_of(held.weight, rank, seed=seed)
            changed[name] = replace(
                linear_derived, constants=replace(linear_derived.constants, remainder=factors)
            )
    return changed
