"""Fold: every constant of the method moved into the weights, biases and inputs of the op.

Linears may be given patterns of their own (`allocation`), their constants follow from statistics
and are corrected by what is learned (`calibration`), and become tensors (`sparsity`).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from nmexport.calibration.checkpoint import Checkpoints
from nmexport.calibration.effort import ERROR_SAMPLES, SENSITIVITY_SAMPLES, learning_settings
from nmexport.errors import ModelError
from nmexport.models.offload import check_layerwise, is_placed, open_dense
from nmexport.sparsity.mitigation import check_allocatable, check_combination
from nmexport.stages import calibrate
from nmexport.stages.fitting import check_fit
from nmexport.store.allocation import write_allocation
from nmexport.store.folded import DENSE, FoldedModel, write_learning
from nmexport.store.layers import SCHEMA, Layers, write_layers
from nmexport.store.tensors import ShardedWriter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn

    from nmexport.allocation.allocate import Prepared
    from nmexport.calibration.corpus import TokenIds
    from nmexport.calibration.learning import Learned
    from nmexport.calibration.quantising import Storage
    from nmexport.calibration.sites import Site
    from nmexport.calibration.sparse_constants import DenseModel, Learning, SparseConstants
    from nmexport.recipe import SparsitySection
    from nmexport.sparsity.linear import Constants
    from nmexport.sparsity.statistics import ChannelStatistics
    from nmexport.stages.inputs import StageInputs
    from nmexport.store.allocation import Allocation
    from nmexport.store.layers import LayerSpec

UPSTREAM: tuple[str, ...] = ("calibrate",)
Artifact = FoldedModel


def key_fields(inputs: StageInputs) -> dict[str, Any]:
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
        "stored": None
        if recipe.model.weights == "float"
        else [_rounds_activations(inputs), recipe.model.dense_baseline],
        "sparsity": recipe.sparsity.model_dump(mode="json"),
        # Without a budget nothing of it matters.
        "allocation": recipe.allocation.model_dump(mode="json") if budgeted else None,
        "seed": recipe.seed,
        "samples": [ERROR_SAMPLES, SENSITIVITY_SAMPLES],
        "learning": None if settings is None else asdict(settings),
        "versions": {"torch": inputs.environment.version("torch")},
    }


def check(inputs: StageInputs) -> None:
    """Refuse what does not fit the model, before anything runs.

    Raises:
        UserError: see `fitting.check_fit`.
    """
    check_fit(inputs.recipe, inputs.source)


def run(inputs: StageInputs) -> dict[str, Any]:
    """Choose, derive and learn the constants of every target, fold, write.

    Raises:
        TargetError: if the recipe's targets select nothing.
        PatternError: if the pattern does not fit a target.
        RecipeError: if no allocation keeps the budget.
        CorpusError: if there is too little text to learn from.
        ModelError: if calibration never reached a target, or a folded weight leaves the type.
    """
    from nmexport.calibration.sparse_constants import make_constants

    dense = _dense_model(inputs)
    learning = _learning(inputs, dense)
    if inputs.recipe.allocation.budget.limits():
        constants = _within_budget(inputs, dense, learning)
    else:
        sections = dict.fromkeys(dense.linears, inputs.recipe.sparsity)
        constants = make_constants(dense, sections, learning=learning)
    storage = _storage(inputs)
    layers = (
        _write_folded(inputs, dense, constants)
        if storage is None
        else _write_stored(inputs, dense, constants, storage)
    )
    write_layers(inputs.output, layers)
    specs = layers.layers
    return {
        "linears": len(specs),
        "relative_error_mean": _mean([spec.relative_error for spec in specs]),
        "gap_closed_mean": _mean([spec.gap_closed for spec in specs]),
        **_write_learning(inputs, constants.learned),
    }


def _dense_model(inputs: StageInputs) -> DenseModel:
    """Open the model, select its targets, and gather what calibration knows of them."""
    from nmexport.calibration.derivation import with_sensitivities
    from nmexport.calibration.forward_passes import on_best_device
    from nmexport.calibration.sites import input_sites
    from nmexport.calibration.sparse_constants import DenseModel
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
    _check_groups(model, statistics, recipe.model.weights)
    if layerwise is None and not is_placed(model):
        model = on_best_device(model)
    samples = calibrated.samples()
    sites = input_sites(model, linears, samples[0], layerwise=layerwise)
    statistics = with_sensitivities(
        model,
        sites,
        linears,
        statistics,
        samples[:SENSITIVITY_SAMPLES],
        criteria={recipe.sparsity.criterion, *recipe.allocation.criteria},
        progress=inputs.progress,
        seed=recipe.seed,
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
    model: nn.Module, statistics: Mapping[str, ChannelStatistics], weights: str
) -> None:
    """Refuse groups of scales that do not fit a linear now, not once all is learned.

    Raises:
        RecipeError: names the linear.
    """
    from nmexport.calibration.quantising import head_name
    from nmexport.sparsity.targets import linears_of
    from nmexport.sparsity.weight_form import WeightForm

    form = WeightForm.parse(weights)
    linears = linears_of(model)
    head = head_name(model, linears)
    for name, linear in linears.items():
        if form is not None and name in statistics and name != head:
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
) -> SparseConstants:
    """Choose for every linear under the recipe's budget, and write down what was chosen."""
    from nmexport.allocation.built import built_within
    from nmexport.calibration.sparse_constants import make_constants

    prepared = _prepared(inputs, dense)

    def build(allocation: Allocation, attempt: int) -> tuple[SparseConstants, Allocation]:
        constants = make_constants(
            dense,
            _sections(inputs.recipe.sparsity, allocation),
            learning=learning,
            unlearned=prepared.unlearned,
            checkpoint="learning" if attempt == 0 else f"learning-{attempt}",
        )
        behaviours = {name: linear.behaviour for name, linear in constants.derived.items()}
        folded = partial(_folded, inputs, dense, constants)
        measured = prepared.as_built(allocation, behaviours, folded)
        inputs.progress.note(measured.summary())
        if measured.remark is not None:
            inputs.progress.note(measured.remark)
        return constants, measured

    constants, allocation = built_within(
        prepared.allocation, build, counts_learned=inputs.recipe.allocation.count_learned
    )
    write_allocation(inputs.output, allocation)
    return constants


def _prepared(inputs: StageInputs, dense: DenseModel) -> Prepared:
    """Measure what a choice for each linear stands on."""
    import torch

    from nmexport.allocation.allocate import prepare
    from nmexport.allocation.costs import Problem
    from nmexport.calibration.derivation import site_constants

    recipe = inputs.recipe

    def constants_for(site: Site, method: SparsitySection) -> Constants:
        return site_constants(site, dense.linears, dense.statistics, method, seed=recipe.seed)

    problem = Problem(
        model=dense.model,
        linears=dense.linears,
        samples=dense.samples,
        sparsity=recipe.sparsity,
        section=recipe.allocation,
        constants_for=constants_for,
        element_bytes=getattr(torch, recipe.model.dtype).itemsize,
        weights=recipe.model.weights,
        progress=inputs.progress,
    )
    return prepare(problem, Checkpoints(inputs.resume).named("allocation"))


def _sections(section: SparsitySection, allocation: Allocation) -> dict[str, SparsitySection]:
    """Decide what each linear that becomes sparse computes."""
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


def _folded(
    inputs: StageInputs, dense: DenseModel, constants: SparseConstants, name: str
) -> dict[str, torch.Tensor]:
    """Fold one sparse linear into its op's inputs; a stored weight is rounded to what is nearest.

    Raises:
        ModelError: if one of them leaves the type.
    """
    import torch

    storage = _storage(inputs)
    if storage is not None:
        folded = constants.folded(dense, name, torch.float32)
        tensors, _ = storage.tensors(folded, storage.form, name=name)
        return tensors
    dtype = inputs.recipe.model.dtype
    folded = constants.folded(dense, name, getattr(torch, dtype))
    _check_finite(folded, name, dtype)
    return folded


def _check_finite(tensors: Mapping[str, torch.Tensor], name: str, dtype: str) -> None:
    for kind, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{kind} of {name} is not finite in {dtype} once folded.",
                fix="use --dtype bfloat16 or float32"
                if dtype == "float16"
                else "check the weights",
            )


def _storage(inputs: StageInputs) -> Storage | None:
    """How weights are stored; None where they stay float."""
    import torch

    from nmexport.calibration.quantising import Storage
    from nmexport.sparsity.weight_form import WeightForm

    section = inputs.recipe.model
    form = WeightForm.parse(section.weights)
    if form is None:
        return None
    return Storage(
        form=form,
        rounds_activations=_rounds_activations(inputs),
        dtype=getattr(torch, section.dtype),
        keeps_dense=section.dense_baseline,
    )


def _rounds_activations(inputs: StageInputs) -> bool:
    """Tell whether what meets weights of integers is rounded too."""
    recipe = inputs.recipe
    if recipe.model.activations != "auto":
        return recipe.model.activations == "int8"
    on_gpu = recipe.target.startswith("tensorrt") or bool(inputs.environment.gpus)
    return not on_gpu


def _write_folded(inputs: StageInputs, dense: DenseModel, constants: SparseConstants) -> Layers:
    """Write the sparse linears, their weights float."""
    names = constants.derived
    with ShardedWriter(inputs.output) as writer:
        for name in inputs.progress.track(names, label="fold: weights", total=len(names)):
            folded = _folded(inputs, dense, constants, name)
            writer.add({f"{name}.{kind}": tensor for kind, tensor in folded.items()})
    return Layers(layers=tuple(constants.layer(name, dense.linears[name]) for name in names))


def _write_stored(
    inputs: StageInputs, dense: DenseModel, constants: SparseConstants, storage: Storage
) -> Layers:
    """Write all linears, their weights in integers.

    Raises:
        ModelError: if a constant leaves the type.
    """
    from nmexport.calibration.quantising import stored_linears
    from nmexport.sparsity.targets import linears_of

    linears = linears_of(dense.model)
    specs: dict[bool, dict[str, LayerSpec]] = {True: {}, False: {}}
    stored = stored_linears(dense, constants, linears, storage)
    with ShardedWriter(inputs.output) as writer:
        for one in inputs.progress.track(stored, label="fold: weights", total=len(linears)):
            name = one.spec.name
            _check_finite(one.tensors, name, inputs.recipe.model.dtype)
            writer.add({f"{name}.{kind}": tensor for kind, tensor in one.tensors.items()})
            as_dense = one.as_dense or {}
            writer.add({f"{name}.{DENSE}.{kind}": tensor for kind, tensor in as_dense.items()})
            specs[one.is_sparse][name] = one.spec
    in_order = {
        kind: tuple(found[name] for name in linears if name in found)
        for kind, found in specs.items()
    }
    return Layers(layers=in_order[True], dense=in_order[False], embedding_bits=8)


def _write_learning(inputs: StageInputs, learned: Learned | None) -> dict[str, Any]:
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
