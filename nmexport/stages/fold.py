"""Fold: every constant of the method moved into the weights, biases and inputs of the op.

Linears may be given patterns of their own (`allocation`), their constants follow from statistics
and are corrected by what is learned (`calibration`), and become tensors (`sparsity`).
"""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING

from nmexport.calibration.checkpoint import Checkpoints
from nmexport.calibration.effort import ERROR_SAMPLES, SENSITIVITY_SAMPLES, learning_settings
from nmexport.errors import ModelError
from nmexport.models.offload import check_layerwise, is_placed, open_dense
from nmexport.sparsity.mitigation import check_allocatable, check_combination
from nmexport.sparsity.pattern import NMPattern
from nmexport.stages import calibrate
from nmexport.stages.fitting import check_fit
from nmexport.stages.storing import (
    around_integers,
    dense_in_integers,
    folding,
    imported,
    rounds_activations,
    with_balances,
    write_linears,
)
from nmexport.store.allocation import write_allocation
from nmexport.store.folded import FoldedModel, write_learning
from nmexport.store.layers import SCHEMA, write_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from nmexport.allocation.allocate import Prepared
    from nmexport.calibration.effort import LearningSettings
    from nmexport.calibration.learning import Learned
    from nmexport.calibration.sites import Site
    from nmexport.calibration.sparse_constants import DenseModel, Learning, SparseConstants
    from nmexport.calibration.text_sources import TokenIds
    from nmexport.models.imported import ImportedWeights
    from nmexport.recipe import Recipe, SparsitySection
    from nmexport.sparsity.linear import Constants
    from nmexport.sparsity.statistics import ChannelStatistics
    from nmexport.sparsity.weight_form import WeightForm
    from nmexport.stages.inputs import StageInputs
    from nmexport.store.allocation import Allocation

UPSTREAM: tuple[str, ...] = ("calibrate",)
Artifact = FoldedModel


def key_fields(inputs: StageInputs) -> dict[str, object]:
    """Return what the linears compute, and in which type.

    Raises:
        RecipeError: if the mitigations do not go together, or not with a budget: said before
            anything runs.
    """
    recipe = inputs.recipe
    mitigations = recipe.sparsity.mitigations
    check_combination(mitigations, recipe.sparsity.phases)
    budgeted = bool(recipe.allocation.budget.limits())
    if budgeted:
        check_allocatable(mitigations)
        for phase in recipe.allocation.phases:
            check_combination(mitigations, phase)
    settings = learning_settings(recipe.sparsity, recipe.seed)
    return {
        "schema": SCHEMA,
        "model": inputs.source.digest,
        "dtype": recipe.model.dtype,
        "weights": recipe.model.weights,
        "stored": ["balanced", rounds_activations(inputs), recipe.model.dense_baseline]
        if recipe.forms.integers or inputs.source.may_hold_integers
        else None,
        "sparsity": recipe.sparsity.model_dump(mode="json"),
        # Without a budget nothing of it matters.
        "allocation": recipe.allocation.model_dump(mode="json") if budgeted else None,
        "seed": recipe.seed,
        "samples": [ERROR_SAMPLES, SENSITIVITY_SAMPLES],
        "learning": None if settings is None else _learning_key(settings, recipe),
        "versions": {"torch": inputs.environment.version("torch")},
    }


def _learning_key(settings: LearningSettings, recipe: Recipe) -> dict[str, object]:
    """Return how constants are learned: layer by layer they come out otherwise.

    Where `--offload auto` has to do so for want of memory is not in the key: the memory that is
    free changes from one run to the next.
    """
    return {**asdict(settings), "by_block": recipe.calibration.offload == "layerwise"}


def check(inputs: StageInputs) -> None:
    """Refuse what does not fit the model, before anything runs.

    Raises:
        UserError: see `fitting.check_fit`.
    """
    check_fit(inputs.recipe, inputs.source)


def run(inputs: StageInputs) -> dict[str, object]:
    """Choose, derive and learn the constants of every target, fold, write.

    Raises:
        TargetError: if the recipe's targets select nothing.
        PatternError: if the pattern does not fit a target.
        RecipeError: if no allocation keeps the budget.
        CorpusError: if there is too little text to learn from.
        ModelError: if calibration never reached a target, or a folded weight leaves the type.
    """
    from nmexport.calibration.sparse_constants import make_constants

    came = imported(inputs)
    if came is not None:
        inputs = around_integers(inputs, came)
    dense = with_balances(inputs, _dense_model(inputs, came))
    learning = _learning(inputs, dense)
    forms: Mapping[str, str] = {}
    if inputs.recipe.allocation.budget.limits():
        constants, forms = _within_budget(inputs, dense, learning)
    else:
        sections = dict.fromkeys(dense.linears, inputs.recipe.sparsity)
        constants = make_constants(dense, sections, learning=learning)
    layers = write_linears(inputs, dense, constants, forms)
    write_layers(inputs.output, layers)
    specs = layers.layers
    return {
        "linears": len(specs),
        "relative_error_mean": _mean([spec.relative_error for spec in specs]),
        "gap_closed_mean": _mean([spec.gap_closed for spec in specs]),
        **_write_learning(inputs, constants.learned),
    }


def _dense_model(inputs: StageInputs, came: ImportedWeights | None) -> DenseModel:
    """Open the model, select its targets, and gather what calibration knows of them."""
    from nmexport.calibration.derivation import with_sensitivities
    from nmexport.calibration.forward_passes import on_best_device
    from nmexport.calibration.sites import input_sites
    from nmexport.calibration.sparse_constants import DenseModel
    from nmexport.calibration.stored_orders import in_common_orders
    from nmexport.sparsity.targets import linears_of, select_targets

    recipe = inputs.recipe
    calibrated = calibrate.Artifact(inputs.upstream["calibrate"])
    opened = open_dense(
        inputs.source,
        offload=recipe.calibration.offload,
        progress=inputs.progress,
        folder=inputs.output,
    )
    model, layerwise = opened.model, opened.layerwise
    if layerwise is not None:
        check_layerwise(recipe)
    targets = recipe.sparsity.targets
    selected = set(
        select_targets(
            model, recipe.sparsity.pattern, include=targets.include, exclude=targets.exclude
        )
    )
    linears = {name: linear for name, linear in linears_of(model).items() if name in selected}
    statistics = calibrated.statistics()
    _check_reached(linears, statistics)
    _check_groups(model, statistics, recipe.forms.integers)
    if layerwise is None and not is_placed(model):
        model = on_best_device(model)
    samples = calibrated.samples()
    sites = input_sites(model, linears, samples[0], layerwise=layerwise)
    if came is not None:
        sites = in_common_orders(sites, came.linear)
    statistics = with_sensitivities(
        model,
        sites,
        linears,
        statistics,
        samples[:SENSITIVITY_SAMPLES],
        criteria={recipe.sparsity.criterion, *recipe.allocation.criteria},
        progress=inputs.progress,
        seed=recipe.seed,
        layerwise=layerwise,
    )
    return DenseModel(
        model=model,
        linears=linears,
        sites=sites,
        statistics=statistics,
        samples=samples,
        kinds=calibrated.samples_by_kind(),
        layerwise=layerwise,
        seed=recipe.seed,
        progress=inputs.progress,
        integers=None if came is None else came.linear,
    )


def _check_reached(
    linears: Mapping[str, nn.Linear], statistics: Mapping[str, ChannelStatistics]
) -> None:
    unreached = [name for name in linears if name not in statistics]
    if unreached:
        raise ModelError(
            f"No calibration token reached {unreached[0]} ({len(unreached)} such linears).",
            fix="calibrate on more samples, or exclude these linears with --targets",
        )


def _check_groups(
    model: nn.Module,
    statistics: Mapping[str, ChannelStatistics],
    forms: Sequence[WeightForm],
) -> None:
    """Refuse groups of scales that do not fit a linear now, not once all is learned.

    Raises:
        RecipeError: names the linear.
    """
    from nmexport.calibration.quantising import head_name
    from nmexport.sparsity.targets import linears_of

    linears = linears_of(model)
    head = head_name(model, linears)
    for name, linear in linears.items():
        for form in forms if name in statistics and name != head else ():
            form.groups(linear.in_features, name=name)


def _learning(inputs: StageInputs, dense: DenseModel) -> Learning | None:
    """How constants are learned; None where the recipe names none that are."""
    from nmexport.calibration.self_text import mixed_self_text
    from nmexport.calibration.sparse_constants import Learning
    from nmexport.models.loader import load_tokenizer

    settings = learning_settings(inputs.recipe.sparsity, inputs.recipe.seed)
    if settings is None:
        return None

    def write(samples: int, length: int, seed: int) -> TokenIds:
        # The tokenizer is read only where something is to be written.
        tokenizer = load_tokenizer(inputs.source)
        generate = mixed_self_text(
            dense.model, tokenizer, progress=inputs.progress, label="fold: own text"
        )
        return generate(samples, length, seed)

    return Learning(settings=settings, write=write, checkpoints=Checkpoints(inputs.resume))


def _within_budget(
    inputs: StageInputs, dense: DenseModel, learning: Learning | None
) -> tuple[SparseConstants, Mapping[str, str]]:
    """Choose for every linear under the recipe's budget, and write down what was chosen.

    Returns:
        Constants of the linears that become sparse, and the forms of weights that were chosen.
    """
    from nmexport.allocation.built import Again, built_within
    from nmexport.calibration.sparse_constants import make_constants

    prepared = _prepared(inputs, dense)

    def build(allocation: Allocation, attempt: int) -> tuple[SparseConstants, Allocation]:
        constants = make_constants(
            dense,
            _sections(inputs.recipe.sparsity, allocation),
            learning=learning if allocation.sparse else None,
            unlearned=prepared.unlearned,
            checkpoint="learning" if attempt == 0 else f"learning-{attempt}",
        )
        behaviours = {name: linear.behaviour for name, linear in constants.derived.items()}
        folded = folding(inputs, dense, constants, allocation.forms)
        if inputs.recipe.forms.integers:
            # Rounding takes longer than a product with what is rounded.
            folded = functools.cache(folded)
        measured = prepared.as_built(allocation, behaviours, folded)
        inputs.progress.note(measured.summary())
        if measured.remark is not None:
            inputs.progress.note(measured.remark)
        return constants, measured

    # Where nothing is learned another build takes seconds, so what is built has to keep the budget.
    unless_counted: Again = "beyond" if learning is None else "never"
    constants, allocation = built_within(
        prepared.allocation,
        build,
        again="always" if inputs.recipe.allocation.count_learned else unless_counted,
    )
    write_allocation(inputs.output, allocation)
    return constants, allocation.forms


def _prepared(inputs: StageInputs, dense: DenseModel) -> Prepared:
    """Measure what a choice for each linear stands on."""
    import torch

    from nmexport.allocation.allocate import prepare
    from nmexport.allocation.costs import Problem
    from nmexport.calibration.derivation import site_constants

    recipe = inputs.recipe

    def constants_for(site: Site, method: SparsitySection) -> Constants:
        return site_constants(
            site,
            dense.linears,
            dense.statistics,
            method,
            seed=recipe.seed,
            integers=dense.integers,
        )

    problem = Problem(
        model=dense.model,
        linears=dense.linears,
        samples=dense.samples,
        sparsity=recipe.sparsity,
        section=recipe.allocation,
        constants_for=constants_for,
        element_bytes=getattr(torch, recipe.model.dtype).itemsize,
        weights=recipe.forms.targets,
        rounded=dense_in_integers(inputs, dense),
        progress=inputs.progress,
    )
    return prepare(problem, Checkpoints(inputs.resume).named("allocation"))


def _sections(section: SparsitySection, allocation: Allocation) -> dict[str, SparsitySection]:
    """Decide what each linear that becomes sparse computes.

    Where none does, all of them are ops that keep all of their input: as `--pattern 16:16` has it.
    """
    if not allocation.sparse:
        group = section.pattern.m
        whole = section.model_copy(
            update={
                "pattern": NMPattern(group, group),
                "criterion": "act",
                "phases": "all",
                "mitigations": (),
                "grouping": "consecutive",
            }
        )
        return dict.fromkeys(allocation.choices, whole)
    return {
        name: section.model_copy(
            update={
                "pattern": choice.pattern,
                "criterion": choice.criterion,
                "phases": choice.phase,
            }
        )
        for name, choice in allocation.sparse.items()
    }


def _write_learning(inputs: StageInputs, learned: Learned | None) -> dict[str, object]:
    """Write the loss curve; return the stage's metrics of it."""
    if learned is None:
        return {}
    curve = learned.curve
    write_learning(inputs.output, settings=asdict(learned.settings), curve=asdict(curve))
    ends = [curve.held_out[place][1] for place in (0, -1)] if curve.held_out else None
    return {"steps": len(curve.learned), "held_out_kl": ends}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
