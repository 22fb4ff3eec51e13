"""Allocation: measure each site, choose under the budget, measure what was chosen, say why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nmexport.allocation import candidates, front, ledger
from nmexport.allocation.as_built import BuiltLinear, errors_as_built
from nmexport.allocation.choice import Allocation, Built
from nmexport.allocation.cost import CostModel
from nmexport.allocation.estimates import inferred
from nmexport.allocation.local_errors import observe_variants
from nmexport.allocation.probe import Probe, spread_windows
from nmexport.allocation.programme import price
from nmexport.allocation.sensitivities import measure_alone
from nmexport.allocation.study import Study
from nmexport.calibration.sites import Site, input_sites
from nmexport.sparsity.targets import _decoder_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from nmexport.allocation.choice import Choice, FrontPoint, LedgerRow
    from nmexport.allocation.probe import Movement
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.progress import Progress
    from nmexport.recipe import AllocationSection, SparsitySection
    from nmexport.sparsity.linear import Behaviour

# Local errors are one number a linear and choice: few tokens tell it.
_ERROR_WINDOWS = 2

PROTOCOL = (
    "Linears that read the same tensor share a choice. Each such site is made sparse alone, its "
    "linears on the inputs of the running model, and KL(dense || sparse) is measured over "
    "{windows} calibration windows of {length} tokens; patterns that were not tried follow from "
    "those that were, through the squared error of the site's outputs. An integer programme picks "
    "one choice for every site. Joint models are then run on {held_out} other calibration windows: "
    "these are the divergences and perplexity ratios of the front, before any learned constant. "
    "What is built is measured on the same windows, and has learned from none of them. "
    "Speed is predicted from the bytes that a decoded token reads and an overhead for each product."
)


def prepare(
    model: Any,
    linears: Mapping[str, nn.Linear],
    samples: torch.Tensor,
    *,
    sparsity: SparsitySection,
    section: AllocationSection,
    constants_for: candidates.ConstantsFor,
    element_bytes: int,
    weights: str = "float",
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> Prepared:
    """Measure every site and the Pareto front: all that a choice stands on.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode; left as it is.
        linears: The targeted linears, by name, in model order.
        samples: `[N, L]` int64 token ids of calibration text; one half of them serves to measure
            sites alone, the other to measure joint models.
        sparsity: The recipe's method: mitigations, grouping, and whatever the section leaves open.
        section: Budget, candidates, cost model.
        constants_for: Calibrated constants of a site under a method.
        element_bytes: Of an exported weight that stays dense.
        weights: How sparse ones are stored, as `nmexport.sparsity.quantisation.FORMS` says.
        progress: Counts what is done.
        checkpoint: Where the trials of sites, the long part, go on from and save to.

    Raises:
        RecipeError: if the method does not go with a budget.
        PatternError: if no candidate fits any linear.
        ModelError: if the dense model's predictions are not finite.
    """
    candidates.check_candidates(sparsity, section)
    task = _Task(
        model=model,
        linears=linears,
        method=candidates.before_learning(sparsity),
        section=section,
        windows=spread_windows(samples, section.windows, section.length, part=0),
        held_out=spread_windows(samples, section.windows, section.length, part=1),
        constants_for=constants_for,
        progress=progress,
    )
    measured = _measured(task, input_sites(model, linears, samples[0]), checkpoint)
    cost = cost_model(model, linears, section, element_bytes=element_bytes, weights=weights)
    study = _study(task, measured, cost)
    points = (
        *front.uniform_points(study, progress),
        *front.front_points(study, section.front, progress),
    )
    return Prepared(task, measured, study, points)


class Prepared:
    """Everything measured; choices cost no more than the joint models they try."""

    def __init__(
        self, task: _Task, measured: _Measured, study: Study, points: Sequence[FrontPoint]
    ) -> None:
        """Hold what `prepare` found."""
        self._task, self._measured, self._study, self._points = task, measured, study, points

    @property
    def unlearned(self) -> torch.Tensor:
        """`[W, L]` windows that measure what is built: nothing may be learned from them."""
        return torch.cat([self._task.held_out, self._error_windows])

    def allocation(self, relief: float = 1.0) -> Allocation:
        """Choose for every linear among dense and the section's candidates.

        Args:
            relief: What the budget of accuracy is multiplied by, where learned constants are known
                to win back so much.

        Raises:
            RecipeError: if no choice keeps the budget, or only the dense model does.
        """
        task, study = self._task, self._study
        picked = front.choose(study, task.section.budget, relief=relief)
        last_byte = price(study.options, max_bytes=study.total(picked).bytes)
        rows = {row.name: row for row in self._ledger(picked, last_byte)}
        result = study.point("chosen", "chosen", picked)
        return Allocation(
            choices={name: rows[name].choice for name in task.linears},
            budget=task.section.budget.limits(),
            bytes_saved=result.bytes_saved,
            decode_speedup=result.decode_speedup,
            kl=result.kl,
            perplexity_ratio=result.perplexity_ratio,
            price=None if last_byte is None else last_byte * study.dense.bytes / 100,
            front=(*self._points, result),
            ledger=tuple(rows[name] for name in task.linears),
            budget_used=front.share_used(
                task.section.budget, kl=result.kl, nll=math.log(result.perplexity_ratio)
            ),
            protocol=_protocol(task, study),
        )

    def as_built(
        self,
        allocation: Allocation,
        behaviours: Mapping[str, Behaviour],
        folded: Callable[[str], Mapping[str, torch.Tensor]],
    ) -> Allocation:
        """The same with what it came to: the built model and each of its linears measured.

        Args:
            allocation: What was built.
            behaviours: Of the linears that became sparse, by name.
            folded: Makes the tensors of one of them, by its name.
        """
        task = self._task
        modules = {
            name: BuiltLinear(one, partial(folded, name), prompt=task.prompt)
            for name, one in behaviours.items()
        }
        moved = self._study.probe.measure_modules(modules)
        alone = {
            name: BuiltLinear(replace(one, phase="all"), partial(folded, name))
            for name, one in behaviours.items()
        }
        errors = errors_as_built(
            task.model,
            {name: task.linears[name] for name in behaviours},
            alone,
            self._error_windows,
            progress=task.progress,
        )
        return replace(
            allocation,
            ledger=tuple(ledger.with_built(row, errors.get(row.name)) for row in allocation.ledger),
            built=Built(
                kl=moved.kl_mean,
                perplexity_ratio=math.exp(moved.nll_mean),
                budget_used=front.share_used(
                    task.section.budget, kl=moved.kl_mean, nll=moved.nll_mean
                ),
            ),
        )

    @property
    def _error_windows(self) -> torch.Tensor:
        return self._task.windows[:_ERROR_WINDOWS]

    def _ledger(self, picked: Sequence[int], last_byte: float | None) -> list[LedgerRow]:
        task, study, measured = self._task, self._study, self._measured
        chosen = study.chosen(picked)
        mitigations = ledger.mitigation_errors(
            task.model,
            task.linears,
            chosen,
            self._error_windows,
            method=task.method,
            constants_for=task.constants_for,
            progress=task.progress,
        )
        return ledger.rows(
            study,
            chosen,
            moved=measured.moved,
            observed=measured.observed,
            mitigations=mitigations,
            method=task.method,
            price=last_byte,
        )


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is to be allocated, and on what text."""

    model: Any
    linears: Mapping[str, nn.Linear]
    method: SparsitySection
    section: AllocationSection
    windows: torch.Tensor
    """`[W, L]`, for sites alone."""
    held_out: torch.Tensor
    """`[W, L]`, for joint models."""
    constants_for: candidates.ConstantsFor
    progress: Progress

    @property
    def prompt(self) -> int:
        """How much of a window counts as its prompt: none, where all phases are sparse alike."""
        alike = set(candidates.phases_of(self.method, self.section)) == {"all"}
        return 0 if alike else self.windows.shape[1] // 2


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Sites alone."""

    variants: candidates.Variants
    observed: Mapping[str, Mapping[str, ErrorObserver]]
    """Local errors by linear and selection."""
    moved: Mapping[Site, Mapping[Choice, Movement]]
    """Trials in the running model."""


def _measured(task: _Task, sites: Sequence[Site], checkpoint: Checkpoint | None) -> _Measured:
    variants = candidates.variants_of(
        sites, method=task.method, section=task.section, constants_for=task.constants_for
    )
    observed = observe_variants(
        task.model,
        task.linears,
        {
            name: {candidates.selection_key(choice): one for choice, one in choices.items()}
            for site, choices in variants.items()
            for name in site.names
        },
        task.windows[:_ERROR_WINDOWS],
        progress=task.progress,
        label="fold: errors of candidates",
    )
    variants = candidates.with_static_variance(variants, observed, task.method)
    moved = measure_alone(
        Probe(task.model, task.windows, prompt=task.prompt),
        _trials(variants, task.method),
        progress=task.progress,
        checkpoint=checkpoint,
    )
    return _Measured(variants=variants, observed=observed, moved=moved)


def _study(task: _Task, measured: _Measured, cost: CostModel) -> Study:
    return Study.of(
        measured.variants,
        {
            site: _estimated(site, choices, measured.moved[site], measured.observed)
            for site, choices in measured.variants.items()
        },
        cost=cost,
        probe=Probe(task.model, task.held_out, prompt=task.prompt),
        prefill_weight=task.section.cost.prefill_weight,
    )


def cost_model(
    model: Any,
    linears: Mapping[str, nn.Linear],
    section: AllocationSection,
    *,
    element_bytes: int,
    weights: str = "float",
) -> CostModel:
    """The section's constants, and what a decoded token reads outside of the targeted linears."""
    targeted = {id(linear.weight) for linear in linears.values()}
    looked_up = id(model.get_input_embeddings().weight)
    output = model.get_output_embeddings()
    if output is not None and id(output.weight) == looked_up:
        looked_up = 0  # tied: read as a whole after all
    other = sum(
        parameter.numel()
        for parameter in model.parameters()
        if id(parameter) not in targeted and id(parameter) != looked_up
    )
    return CostModel(
        bytes_per_second=section.cost.gigabytes_per_second * 1e9,
        dense_overhead_seconds=section.cost.dense_overhead_us * 1e-6,
        sparse_overhead_seconds=section.cost.sparse_overhead_us * 1e-6,
        element_bytes=element_bytes,
        sparse_weights=weights,
        other_bytes=other * element_bytes,
        rest_seconds=section.cost.layer_overhead_us * 1e-6 * _decoder_layers(model)[1],
    )


def _trials(
    variants: candidates.Variants, method: SparsitySection
) -> dict[Site, dict[Choice, Any]]:
    """The choices that are measured rather than inferred."""
    return {
        site: candidates.sparse_inputs(
            site,
            {one: choices[one] for one in candidates.anchors(list(choices), method.pattern)},
        )
        for site, choices in variants.items()
    }


def _estimated(
    site: Site,
    choices: Mapping[Choice, Any],
    moved: Mapping[Choice, Movement],
    observed: Mapping[str, Mapping[str, ErrorObserver]],
) -> dict[Choice, float]:
    """Divergence of each choice of a site, measured or inferred within its criterion and phase."""
    found: dict[Choice, float] = {}
    for kind in dict.fromkeys((one.criterion, one.phase) for one in choices):
        mine = [one for one in choices if (one.criterion, one.phase) == kind]
        squares = {one: _squared_error(site, choices[one], one, observed) for one in mine}
        tried = {one: moved[one].kl_mean for one in mine if one in moved}
        found |= inferred(squares, tried)
    return found


def _squared_error(
    site: Site,
    variant: Any,
    choice: Choice,
    observed: Mapping[str, Mapping[str, ErrorObserver]],
) -> float:
    """Squared errors of a site's linears, each over its own output's squares, summed."""
    nu = variant.constants.nu
    errors = [
        observed[name][candidates.selection_key(choice)].relative_error(1.0 if nu is None else nu)
        for name in site.names
    ]
    return math.fsum(one * one for one in errors if one is not None)


def _protocol(task: _Task, study: Study) -> dict[str, Any]:
    length = task.windows.shape[1]
    words = PROTOCOL.format(windows=len(task.windows), length=length, held_out=len(task.held_out))
    if task.prompt:
        words += (
            f" The first {task.prompt} tokens of a window are its prompt and are not scored; the "
            "rest count as decoded."
        )
    return {
        "words": words,
        "sites": len(study.sites),
        "windows": len(task.windows),
        "held_out_windows": len(task.held_out),
        "length": length,
        "prompt": task.prompt,
        "joint_over_sum": study.kl.factor(),
        "cost": dict(vars(study.cost)),
    }
