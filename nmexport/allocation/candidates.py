"""What every site may become, with the constants it would compute with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.allocation.choice import Choice, Phases
from nmexport.allocation.local_errors import Variant
from nmexport.allocation.sparse_input import SparseInput
from nmexport.calibration.method import behaviour_of, needs_static_variance
from nmexport.errors import PatternError
from nmexport.sparsity.mitigation import MITIGATIONS, check_allocatable, check_combination

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.calibration.sites import Site
    from nmexport.recipe import AllocationSection, SparsitySection
    from nmexport.sparsity.linear import Constants
    from nmexport.sparsity.pattern import NMPattern

    ConstantsFor = Callable[[Site, SparsitySection], Constants]
    """Calibrated constants of a site's linears under a method."""

Variants = dict["Site", dict[Choice, Variant]]

# Learned corrections that make up for the variance that selection takes away.
_SCALES = {"scale", "gain", "compensation"}


def check_candidates(sparsity: SparsitySection, section: AllocationSection) -> None:
    """Refuse what cannot be folded or tried, before anything runs.

    Raises:
        RecipeError: if a mitigation does not go with one of the phases, or with a budget.
    """
    check_allocatable(sparsity.mitigations)
    for phase in phases_of(sparsity, section):
        check_combination(sparsity.mitigations, phase)


def phases_of(sparsity: SparsitySection, section: AllocationSection) -> Sequence[Phases]:
    """Phases to choose among: the section's, or the recipe's own."""
    return section.phases or (sparsity.phases,)


def before_learning(sparsity: SparsitySection) -> SparsitySection:
    """The method that trials use: what is not learned, and what stands for what is.

    Constants are learned once the choice is made. Until then a per-token variance correction
    stands for learned scales, which mend the same; where none is learned, nothing is added, so
    that the budget is measured on what is built.
    """
    left = tuple(one for one in sparsity.mitigations if not MITIGATIONS[one].learns)
    scales = any(MITIGATIONS[one].corrects in _SCALES for one in sparsity.mitigations)
    if scales and not any(MITIGATIONS[one].corrects == "variance" for one in left):
        left = (*left, "var")
    return sparsity.model_copy(update={"mitigations": left})


def variants_of(
    sites: Sequence[Site],
    *,
    method: SparsitySection,
    section: AllocationSection,
    constants_for: ConstantsFor,
) -> Variants:
    """The sparse choices of each site, in order of falling density; dense goes without saying.

    Raises:
        PatternError: if no pattern fits any site.
    """
    found: Variants = {}
    for site in sites:
        fitting = [
            one for one in section.patterns if one.n < one.m and site.in_features % one.m == 0
        ]
        found[site] = {}
        for pattern in sorted(fitting, key=lambda one: -one.density):
            for criterion in section.criteria or (method.criterion,):
                one = method.model_copy(update={"pattern": pattern, "criterion": criterion})
                constants = constants_for(site, one)
                for phase in phases_of(method, section):
                    behaviour = behaviour_of(one.model_copy(update={"phases": phase}))
                    choice = Choice(pattern=str(pattern), criterion=criterion, phase=phase)
                    found[site][choice] = Variant(behaviour=behaviour, constants=constants)
    if not any(found.values()):
        raise PatternError(
            "None of the patterns to choose among fits any linear: in_features must be a multiple "
            "of M.",
            allowed="allocation.patterns with an M that divides in_features",
        )
    return found


def with_static_variance(
    variants: Variants,
    observed: Mapping[str, Mapping[str, ErrorObserver]],
    sparsity: SparsitySection,
) -> Variants:
    """The same, with the static variance correction where the recipe has one."""
    if not needs_static_variance(sparsity):
        return variants
    return {
        site: {
            choice: replace(
                one,
                constants=replace(
                    one.constants, nu=observed[site.names[0]][selection_key(choice)].static_nu()
                ),
            )
            for choice, one in choices.items()
        }
        for site, choices in variants.items()
    }


def selection_key(choice: Choice) -> str:
    """A choice apart from its phase: what local errors depend on."""
    return f"{choice.pattern} {choice.criterion}"


def sparse_inputs(site: Site, variants: Mapping[Choice, Variant]) -> dict[Choice, SparseInput]:
    """Ready to be tried."""
    return {
        choice: SparseInput(one.behaviour, one.constants, site.in_features)
        for choice, one in variants.items()
    }


def anchors(choices: Sequence[Choice], base: NMPattern) -> list[Choice]:
    """Choices worth a trial: one for each criterion and phase.

    What other patterns cost follows from their local errors. It is the recipe's own pattern, if
    that is a candidate.
    """
    kinds = dict.fromkeys((one.criterion, one.phase) for one in choices)
    chosen = []
    for kind in kinds:
        mine = [one for one in choices if (one.criterion, one.phase) == kind]
        chosen.append(next((one for one in mine if one.nm == base), mine[(len(mine) - 1) // 2]))
    return chosen
