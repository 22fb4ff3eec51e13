"""Price every choice of each site in accuracy; `prices` has bytes and time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from nmexport.allocation.built import errors_as_built
from nmexport.allocation.gradients import estimate_alone
from nmexport.allocation.probe import (
    Movement,
    Probe,
    RoundedSite,
    SparseInput,
    measure_alone,
    spread_windows,
)
from nmexport.calibration.forward_passes import forward_sample, hooked
from nmexport.calibration.local_error import ErrorObserver, observe_error
from nmexport.calibration.method import behaviour_of, needs_static_variance
from nmexport.errors import PatternError
from nmexport.sparsity.mitigation import MITIGATIONS, check_allocatable, check_combination
from nmexport.store.allocation import Choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.allocation.probe import Trials
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.sites import Site
    from nmexport.choices import Phase
    from nmexport.progress import Progress
    from nmexport.recipe import AllocationSection, SparsitySection
    from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
    from nmexport.sparsity.pattern import NMPattern

    ConstantsFor = Callable[[Site, SparsitySection], Constants]
    """Calibrated constants of a site's linears under a method."""

Key = TypeVar("Key")

# A linear's error is one number for each choice: a few tokens tell it.
ERROR_WINDOWS = 2
# Learned corrections that make up for the variance that selection takes away.
_SCALES = {"scale", "gain", "compensation"}
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A dense model, what its linears may become, and the text that tells what it costs."""

    model: Any
    """A Hugging Face causal language model in evaluation mode; it is left as it is."""
    linears: Mapping[str, nn.Linear]
    """The targets by name, in model order."""
    samples: torch.Tensor
    """`[N, L]` int64 token ids of calibration text: one half of them to try sites alone, the other
    to run joint models."""
    sparsity: SparsitySection
    """The recipe's method: mitigations, grouping, and whatever the section leaves open."""
    section: AllocationSection
    """Budget, candidates, cost model."""
    constants_for: ConstantsFor
    element_bytes: int
    """Size of an exported weight that stays dense."""
    weights: tuple[str, ...] = ("float",)
    """How weights are stored, as `nmexport.sparsity.weight_form.FORMS` says: one form, or those to
    choose among, the finest first."""
    rounded: Rounded | None = None
    """The linears in these forms; None where weights are floats. What quantisation costs counts in
    every joint model."""
    progress: Progress

    @property
    def is_mixed(self) -> bool:
        """Tell whether there are several forms of weights to choose among."""
        return len(self.weights) > 1

    @cached_property
    def method(self) -> SparsitySection:
        """The method of trials."""
        return before_learning(self.sparsity)

    @cached_property
    def windows(self) -> torch.Tensor:
        """`[W, L]` token ids on which sites are tried alone."""
        return spread_windows(self.samples, self.section.windows, self.section.length, part=0)

    @cached_property
    def held_out(self) -> torch.Tensor:
        """`[W, L]` token ids on which joint models are run."""
        count = self.section.held_out or self.section.windows
        return spread_windows(self.samples, count, self.section.length, part=1)

    @property
    def prompt(self) -> int:
        """Tokens of a window that count as its prompt: none, where all phases are sparse alike."""
        alike = set(phases_of(self.method, self.section)) == {"all"}
        return 0 if alike else self.windows.shape[1] // 2

    @property
    def error_windows(self) -> torch.Tensor:
        """Windows that errors of single linears are measured on."""
        return self.windows[:ERROR_WINDOWS]


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """Linears that keep all of their input, as their weights in integers have them."""

    modules: Mapping[str, Mapping[str, SparseLinear]]
    """The targets, by form of weights and by name; a form of floats has none."""
    others: Mapping[str, SparseLinear]
    """Those that are no targets, the output head among them, by name."""
    head: str
    """How the output head is stored."""

    def of(self, choices: Mapping[str, Choice]) -> dict[str, SparseLinear]:
        """Return all that are in integers where linears have these choices, by name."""
        finest = next(iter(self.modules))
        chosen = {
            name: self.modules[choice.weights or finest].get(name)
            for name, choice in choices.items()
        }
        return {**self.others, **{name: one for name, one in chosen.items() if one is not None}}


# -- candidates ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way a linear or site could compute."""

    behaviour: Behaviour
    constants: Constants


Variants = dict["Site", dict[Choice, Variant]]


def check_candidates(problem: Problem) -> None:
    """Refuse what cannot be folded or tried, before anything runs.

    Raises:
        RecipeError: if a mitigation does not go with one of the phases, or with a budget.
    """
    mitigations = problem.sparsity.mitigations
    check_allocatable(mitigations)
    for phase in phases_of(problem.sparsity, problem.section):
        check_combination(mitigations, phase)


def phases_of(sparsity: SparsitySection, section: AllocationSection) -> Sequence[Phase]:
    """Return the phases to choose among: the section's, or the recipe's own."""
    return section.phases or (sparsity.phases,)


def before_learning(sparsity: SparsitySection) -> SparsitySection:
    """Return the method that trials use: what is not learned, and a stand-in for what is.

    Constants are learned once the choice is made. Until then a per-token variance correction
    stands for learned scales, which correct the same; where none is learned, nothing is added, so
    that the budget is measured on what is built.
    """
    left = tuple(name for name in sparsity.mitigations if not MITIGATIONS[name].learns)
    scales = any(MITIGATIONS[name].corrects in _SCALES for name in sparsity.mitigations)
    if scales and not any(MITIGATIONS[name].corrects == "variance" for name in left):
        left = (*left, "var")
    return sparsity.model_copy(update={"mitigations": left})


def variants_of(problem: Problem, sites: Sequence[Site]) -> Variants:
    """List the sparse choices of each site, densest first.

    Raises:
        PatternError: if no pattern drops channels, or none fits any site.
    """
    method, section = problem.method, problem.section
    variants: Variants = {site: {} for site in sites}
    if all(pattern.n == pattern.m for pattern in section.patterns):
        if problem.is_mixed:
            return variants  # the choice is one of forms alone
        raise PatternError(
            "Every pattern to choose among keeps all channels, so nothing could become sparse.",
            allowed="allocation.patterns (--budget-pattern) with one of N < M",
        )
    for site in sites:
        fitting = [p for p in section.patterns if p.n < p.m and site.in_features % p.m == 0]
        for pattern in sorted(fitting, key=lambda p: -p.density):
            for criterion in section.criteria or (method.criterion,):
                changed = method.model_copy(update={"pattern": pattern, "criterion": criterion})
                constants = problem.constants_for(site, changed)
                for phase in phases_of(method, section):
                    choice = Choice(pattern=pattern, criterion=criterion, phase=phase)
                    behaviour = behaviour_of(changed.model_copy(update={"phases": phase}))
                    variants[site][choice] = Variant(behaviour=behaviour, constants=constants)
    if not any(variants.values()) and not problem.is_mixed:
        raise PatternError(
            "None of the patterns to choose among fits any linear: in_features must be a multiple "
            "of M.",
            allowed="allocation.patterns with an M that divides in_features",
        )
    return variants


def anchors(choices: Iterable[Choice], base: NMPattern) -> list[Choice]:
    """Pick the choices worth a trial: one for each criterion and phase.

    What other patterns cost follows from their local errors. It is the recipe's own pattern, if
    that is a candidate.
    """
    return [
        next((choice for choice in kin if choice.pattern == base), kin[(len(kin) - 1) // 2])
        for kin in _by_kind(choices)
    ]


def _by_kind(choices: Iterable[Choice]) -> list[list[Choice]]:
    """Group choices that differ in their pattern alone."""
    kinds: dict[Choice, list[Choice]] = {}
    for choice in choices:
        kinds.setdefault(replace(choice, pattern=None), []).append(choice)
    return list(kinds.values())


# -- accuracy --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SiteCosts:
    """Accuracy cost of every sparse choice of every site, alone."""

    variants: Variants
    errors: Mapping[str, Mapping[Choice, ErrorObserver]]
    """Local errors by linear and choice, of all phases alike."""
    moved: Mapping[Site, Mapping[Choice, Movement]]
    """Trials in the running model: of selections, and of forms coarser than the finest."""
    rounding_errors: Mapping[str, Mapping[str, float | None]]
    """Relative output errors of linears that keep all of their input, by form and name; the finest
    of several forms, or the only one, has none."""

    def error(self, site: Site, name: str, choice: Choice) -> float | None:
        """Relative output error of one of the site's linears; None where it is undefined.

        What a form rounds and what a selection drops are independent: their squares add up.
        """
        errors = []
        if choice.pattern is not None:
            errors.append(self._selection_error(site, name, choice.selection))
        rounding = self.rounding_errors.get(choice.weights or "")
        if rounding is not None:
            errors.append(rounding[name])
        squares = [error * error for error in errors if error is not None]
        return math.sqrt(math.fsum(squares)) if len(squares) == len(errors) else None

    def _selection_error(self, site: Site, name: str, choice: Choice) -> float | None:
        nu = self.variants[site][choice].constants.nu
        return self.errors[name][_everywhere(choice)].relative_error(1.0 if nu is None else nu)

    def divergence_of(self, site: Site, form: str | None) -> float:
        """Nats a token that a form of weights causes beyond the finest."""
        tried = self.moved[site].get(Choice(weights=form))
        return 0.0 if tried is None else tried.kl_mean

    def stderr(self, site: Site, choice: Choice) -> float | None:
        """Standard error of a choice's divergence; None where it follows from other choices."""
        tried = self.moved[site]
        parts = [tried.get(choice.selection)] if choice.pattern is not None else []
        if (choice.weights or "") in self.rounding_errors:
            parts.append(tried.get(Choice(weights=choice.weights)))
        squares = [part.kl_stderr**2 for part in parts if part is not None]
        return math.sqrt(math.fsum(squares)) if parts and len(squares) == len(parts) else None

    def divergences(self, site: Site) -> dict[Choice, float]:
        """Nats a token that each selection causes: measured, or inferred from its kin's trial."""
        divergences: dict[Choice, float] = {}
        for kin in _by_kind(self.variants[site]):
            tried = {
                choice: self.moved[site][choice].kl_mean
                for choice in kin
                if choice in self.moved[site]
            }
            divergences |= inferred(
                {choice: self._squared_error(site, choice) for choice in kin}, tried
            )
        return divergences

    def _squared_error(self, site: Site, choice: Choice) -> float:
        """Sum the squared relative errors of the site's linears."""
        errors = [self._selection_error(site, name, choice) for name in site.names]
        return math.fsum(error * error for error in errors if error is not None)


def measure_sites(
    problem: Problem, sites: Sequence[Site], checkpoint: Checkpoint | None
) -> SiteCosts:
    """Try every site alone: its linears' errors, then the model's predictions.

    Args:
        problem: Model, candidates and text.
        sites: Of the model, in order.
        checkpoint: Where trials, the long part, go on from and save to.

    Raises:
        PatternError: if no candidate fits any site.
        ModelError: if the dense model's predictions are not finite.
    """
    variants = variants_of(problem, sites)
    errors = observe_variants(
        problem,
        {
            name: {_everywhere(choice): variant for choice, variant in choices.items()}
            for site, choices in variants.items()
            for name in site.names
        },
        label="fold: errors of candidates",
    )
    if needs_static_variance(problem.method):
        variants = _with_static_variance(variants, errors)
    trials: Trials = {
        site: {
            **{
                choice: sparse_input(site, choices[choice])
                for choice in anchors(choices, problem.method.pattern)
            },
            **_rounding_trials(problem, site),
        }
        for site, choices in variants.items()
    }
    if problem.section.trials == "gradient":
        moved = estimate_alone(
            problem.model,
            problem.windows,
            trials,
            prompt=problem.prompt,
            progress=problem.progress,
        )
    else:
        moved = measure_alone(
            Probe(problem.model, problem.windows, prompt=problem.prompt),
            trials,
            progress=problem.progress,
            checkpoint=checkpoint,
        )
    return SiteCosts(
        variants=variants, errors=errors, moved=moved, rounding_errors=_rounding_errors(problem)
    )


def _coarser(problem: Problem) -> dict[str, Mapping[str, SparseLinear]]:
    """Targets in every form but the finest, by form."""
    if problem.rounded is None:
        return {}
    return {form: problem.rounded.modules[form] for form in problem.weights[1:]}


def _rounding_trials(problem: Problem, site: Site) -> dict[Choice, RoundedSite]:
    return {
        Choice(weights=form): RoundedSite({name: modules[name] for name in site.names})
        for form, modules in _coarser(problem).items()
    }


def _rounding_errors(problem: Problem) -> dict[str, dict[str, float | None]]:
    """Measure what each form but the finest loses in each linear alone."""
    return {
        form: errors_as_built(
            problem.model,
            problem.linears,
            modules,
            problem.error_windows,
            progress=problem.progress,
            label=f"fold: errors of {form}",
        )
        for form, modules in _coarser(problem).items()
    }


def sparse_input(site: Site, variant: Variant) -> SparseInput:
    """Make the input that a trial hands to the site's linears."""
    return SparseInput(variant.behaviour, variant.constants, site.in_features)


def observe_variants(
    problem: Problem, variants: Mapping[str, Mapping[Key, Variant]], *, label: str
) -> dict[str, dict[Key, ErrorObserver]]:
    """Run the dense model once and try every variant of every linear on its input.

    Args:
        problem: Model and text.
        variants: By linear, then by anything.
        label: What is being done.
    """
    seen = {name: {key: ErrorObserver() for key in variants[name]} for name in problem.linears}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            x = arguments[0]
            for key, variant in variants[name].items():
                error = observe_error(linear, variant.behaviour, variant.constants, x, output)
                seen[name][key].merge(error)

        return linear.register_forward_hook(hook)

    windows = problem.error_windows
    with hooked(watch(*named) for named in problem.linears.items()):
        for window in problem.progress.track(windows, label=label, total=len(windows)):
            forward_sample(problem.model, window)
    return seen


def inferred(squared_errors: Mapping[Key, float], tried: Mapping[Key, float]) -> dict[Key, float]:
    """Infer the divergences of a site's choices from those that were tried.

    A small change of a linear's output moves the predictions by a divergence that is quadratic in
    it: so the choices of one site cost in proportion to the squared errors that they leave. On
    SmolLM2 this is right within a fifth from 12:16 to 4:16, less than a trial on few windows is
    uncertain by.

    Args:
        squared_errors: Of the site's outputs, by choice.
        tried: Measured divergences of one or more of them.

    Returns:
        By choice: the measured ones as they are, the others from the nearest of them.
    """

    def square(key: Key) -> float:
        return max(squared_errors[key], _LEAST_SQUARE)

    def infer(key: Key) -> float:
        nearest = min(tried, key=lambda other: abs(math.log(square(other) / square(key))))
        return tried[nearest] * square(key) / square(nearest)

    return {key: tried[key] if key in tried else infer(key) for key in squared_errors}


def _everywhere(choice: Choice) -> Choice:
    """Drop the phase: local errors do not depend on it."""
    return replace(choice, phase="all")


def _with_static_variance(
    variants: Variants, errors: Mapping[str, Mapping[Choice, ErrorObserver]]
) -> Variants:
    def corrected(site: Site, choice: Choice, variant: Variant) -> Variant:
        nu = errors[site.names[0]][_everywhere(choice)].static_nu()
        return replace(variant, constants=replace(variant.constants, nu=nu))

    return {
        site: {choice: corrected(site, choice, variant) for choice, variant in choices.items()}
        for site, choices in variants.items()
    }
