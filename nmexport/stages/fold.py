"""Fold: every constant of the method moved into the weights, biases and inputs of the op.

Linears may be given patterns of their own (`allocate`), their constants follow from statistics
(`derivation`), are corrected by what is learned (`learning`), and become tensors (`sparsity`).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from nmexport.calibration.effort import learning_settings
from nmexport.errors import ModelError
from nmexport.sparsity.mitigation import check_allocatable, check_combination
from nmexport.stages import calibrate
from nmexport.stages.fitting import check_fit
from nmexport.store.allocation import Allocation, write_allocation
from nmexport.store.folded import LEARNING, FoldedModel
from nmexport.store.layers import LayerSpec, write_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from torch import nn

    from nmexport.allocation.allocate import Prepared
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.corpus import TokenIds
    from nmexport.calibration.derivation import Derived
    from nmexport.calibration.grouping_distance import GroupingDistance
    from nmexport.calibration.learning import Learned
    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.calibration.sites import Site
    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.recipe import SparsitySection
    from nmexport.sparsity.linear import Constants
    from nmexport.sparsity.statistics import ChannelStatistics
    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ("calibrate",)
# Local errors and the static variance correction need few tokens: one number a layer.
ERROR_SAMPLES = 4
SENSITIVITY_SAMPLES = 16
DISTANCE_SAMPLES = 2
Artifact = FoldedModel


class _Given(NamedTuple):
    """What the steps of this stage work on."""

    inputs: StageInputs
    model: Any
    linears: Mapping[str, nn.Linear]
    """The targets, in model order."""
    sites: Sequence[Site]
    statistics: Mapping[str, ChannelStatistics]
    samples: torch.Tensor
    """`[samples, length]`, of all kinds."""
    kinds: Mapping[str, torch.Tensor]
    layerwise: LayerwiseModel | None
    """Runs the model where it does not fit into memory."""

    def loaded(self, linear: nn.Linear) -> AbstractContextManager[nn.Linear]:
        """A linear with its weight in memory, while this lasts."""
        return nullcontext(linear) if self.layerwise is None else self.layerwise.loaded(linear)


class _Made(NamedTuple):
    """Constants of the linears that become sparse."""

    derived: Mapping[str, Derived]
    errors: Mapping[str, ErrorObserver]
    distances: Mapping[str, GroupingDistance]
    learned: Learned | None


def key_fields(inputs: StageInputs) -> dict[str, Any]:
    """What the linears compute, and in which type.

    Raises:
        RecipeError: if the mitigations do not go together, or not with a budget: said before
            anything runs.
    """
    recipe = inputs.recipe
    mitigations = recipe.sparsity.mitigations
    check_combination(mitigations, recipe.sparsity.phases)
    if recipe.allocation.budget.limits():
        check_allocatable(mitigations)
        for phase in recipe.allocation.phases:
            check_combination(mitigations, phase)
    settings = learning_settings(recipe.sparsity, recipe.seed)
    return {
        "model": inputs.source.digest,
        "dtype": recipe.model.dtype,
        "weights": recipe.model.weights,
        "sparsity": recipe.sparsity.model_dump(mode="json"),
        "allocation": _allocation_key(recipe.allocation),
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
    given = _given(inputs)
    prepared = _prepared(given)
    allocation = None
    if prepared is None:
        made = _made(given, dict.fromkeys(given.linears, inputs.recipe.sparsity))
    else:
        made, allocation = _made_within_budget(given, prepared)
    _write_tensors(given, made)
    specs = [_layer_spec(name, given.linears[name], made) for name in made.derived]
    write_layers(inputs.output, specs)
    if allocation is not None:
        write_allocation(inputs.output, allocation)
    return {
        "linears": len(specs),
        "relative_error_mean": _mean([spec.relative_error for spec in specs]),
        "gap_closed_mean": _mean([spec.gap_closed for spec in specs]),
        **_written_learning(inputs.output, made.learned),
    }


def _made_within_budget(given: _Given, prepared: Prepared) -> tuple[_Made, Allocation]:
    from nmexport.allocation.built import built_within

    def build(allocation: Allocation, attempt: int) -> tuple[_Made, Allocation]:
        made = _made(
            given,
            _sections(given, allocation),
            unlearned=prepared.unlearned,
            learning="learning" if attempt == 0 else f"learning-{attempt}",
        )
        behaviours = {name: one.behaviour for name, one in made.derived.items()}
        measured = prepared.as_built(allocation, behaviours, partial(_folded, given, made))
        given.inputs.progress.note(_came_to(measured))
        if measured.remark is not None:
            given.inputs.progress.note(measured.remark)
        return made, measured

    made, allocation = built_within(
        prepared.allocation, build, counts_learned=given.inputs.recipe.allocation.count_learned
    )
    return made, allocation


def _came_to(allocation: Allocation) -> str:
    """Describe what was chosen and what became of it, in a line."""
    built = allocation.built
    assert built is not None  # noqa: S101 - for the type checker
    words = (
        f"{allocation.bytes_saved:.0%} of the bytes saved: perplexity ratio "
        f"{allocation.perplexity_ratio:.3f} as chosen, {built.perplexity_ratio:.3f} as built"
    )
    broken = built.budget_used is not None and built.budget_used > 1
    return f"{words}, which exceeds the budget" if broken else words


def _made(
    given: _Given,
    sections: Mapping[str, SparsitySection],
    *,
    unlearned: torch.Tensor | None = None,
    learning: str = "learning",
) -> _Made:
    """Constants of the linears that have sections.

    Args:
        given: Model, statistics, text.
        sections: What each sparse linear is to compute.
        unlearned: Windows that nothing may be learned from.
        learning: Names the checkpoint.
    """
    from nmexport.calibration import derivation
    from nmexport.calibration.forward_passes import gather_errors

    seed = given.inputs.recipe.seed
    derived = derivation.derive(
        given.sites, given.linears, given.statistics, sections, seed=seed, loaded=given.loaded
    )
    derived = derivation.with_remainders(derived, given.linears, seed=seed, loaded=given.loaded)
    errors = gather_errors(
        given.model,
        {name: given.linears[name] for name in derived},
        {name: one.constants for name, one in derived.items()},
        {name: one.behaviour for name, one in derived.items()},
        given.samples[:ERROR_SAMPLES],
        progress=given.inputs.progress,
        layerwise=given.layerwise,
    )
    derived = _with_static_variance(derived, errors)
    distances = _distances(given, derived)
    learned = _learned(given, derived, unlearned, checkpoint=learning)
    return _Made(derived, errors, distances, learned)


def _given(inputs: StageInputs) -> _Given:
    from nmexport.calibration.derivation import with_sensitivities
    from nmexport.calibration.forward_passes import on_best_device
    from nmexport.calibration.sites import input_sites
    from nmexport.models.offload import check_layerwise, is_placed, open_dense
    from nmexport.sparsity.quantisation import scale_groups
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
    for name, linear in linears.items():
        scale_groups(recipe.model.weights, linear.in_features, name=name)  # refused now, or late
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
    kinds = calibrated.samples_by_kind()
    return _Given(inputs, model, linears, sites, statistics, samples, kinds, layerwise)


def _check_reached(
    linears: Mapping[str, nn.Linear], statistics: Mapping[str, ChannelStatistics]
) -> None:
    unreached = [name for name in linears if name not in statistics]
    if unreached:
        raise ModelError(
            f"No calibration token reached {unreached[0]} ({len(unreached)} such linears).",
            fix="calibrate on more samples, or exclude these linears with --targets",
        )


def _allocation_key(section: Any) -> dict[str, Any] | None:
    """Nothing of it matters without a budget."""
    return section.model_dump(mode="json") if section.budget.limits() else None


def _prepared(given: _Given) -> Prepared | None:
    """What a choice for each linear stands on, where the recipe sets a budget."""
    import torch

    from nmexport.allocation.allocate import prepare
    from nmexport.allocation.costs import Problem
    from nmexport.calibration.derivation import site_constants

    recipe = given.inputs.recipe
    if not recipe.allocation.budget.limits():
        return None

    def constants_for(site: Site, method: SparsitySection) -> Constants:
        return site_constants(site, given.linears, given.statistics, method, seed=recipe.seed)

    problem = Problem(
        model=given.model,
        linears=given.linears,
        samples=given.samples,
        sparsity=recipe.sparsity,
        section=recipe.allocation,
        constants_for=constants_for,
        element_bytes=getattr(torch, recipe.model.dtype).itemsize,
        weights=recipe.model.weights,
        progress=given.inputs.progress,
    )
    return prepare(problem, _checkpoint(given, "allocation"))


def _sections(given: _Given, allocation: Allocation) -> dict[str, SparsitySection]:
    """Return what each linear that becomes sparse is to compute."""
    section = given.inputs.recipe.sparsity
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


def _with_static_variance(
    derived: Mapping[str, Derived], errors: Mapping[str, ErrorObserver]
) -> dict[str, Derived]:
    """With nu, where a section asks for it, from the dense model's activations.

    Those of the model that is sparse already change no result: on SmolLM2 at 8:16 each nu was the
    same within half a percent, and perplexity within the noise of what near ties decide.
    """
    from nmexport.calibration.method import needs_static_variance

    return {
        name: replace(one, constants=replace(one.constants, nu=errors[name].static_nu()))
        if needs_static_variance(one.section)
        else one
        for name, one in derived.items()
    }


def _distances(given: _Given, derived: Mapping[str, Derived]) -> dict[str, GroupingDistance]:
    """How close each order comes to unstructured selection; of consecutive groups, nothing."""
    from nmexport.calibration.grouping_distance import grouping_distances

    ordered = {
        name: one for name, one in derived.items() if one.constants.channel_order is not None
    }
    if not ordered:
        return {}
    return grouping_distances(
        given.model,
        {name: given.linears[name] for name in ordered},
        {name: one.constants for name, one in ordered.items()},
        {name: one.behaviour for name, one in ordered.items()},
        given.samples[-DISTANCE_SAMPLES:],
        progress=given.inputs.progress,
        layerwise=given.layerwise,
    )


def _learned(
    given: _Given,
    derived: Mapping[str, Derived],
    unlearned: torch.Tensor | None,
    *,
    checkpoint: str,
) -> Learned | None:
    """Corrections of all linears, learned together; None where the recipe names none."""
    from nmexport.calibration.corpus import text_seed
    from nmexport.calibration.learning import learn
    from nmexport.calibration.learning_text import with_more_written

    recipe = given.inputs.recipe
    settings = learning_settings(recipe.sparsity, recipe.seed)
    if settings is None:
        return None
    corpus, own = _learning_samples(given, unlearned)
    own = with_more_written(
        corpus,
        own,
        partial(_write, given),
        settings=settings,
        seed=text_seed(recipe.seed, "learning"),
        checkpoint=_checkpoint(given, "text"),
    )
    return learn(
        given.model,
        {name: given.linears[name] for name in derived},
        {name: one.constants for name, one in derived.items()},
        {name: one.behaviour for name, one in derived.items()},
        [corpus, own],
        settings=settings,
        sites=[site.names for site in given.sites],
        progress=given.inputs.progress,
        checkpoint=_checkpoint(given, checkpoint, of=str(settings)),
    )


def _learning_samples(
    given: _Given, unlearned: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of the corpus and of the model's own text, without windows not to learn from."""
    import torch

    from nmexport.calibration.learning import without

    kinds = given.kinds
    corpus, own = torch.cat([kinds["corpus"], kinds["further"]]), kinds["written"]
    if unlearned is None:
        return corpus, own
    return without(corpus, unlearned), without(own, unlearned)


def _write(given: _Given, samples: int, length: int, seed: int) -> TokenIds:
    """The model as an author; its tokenizer is read only where something is to be written."""
    from nmexport.calibration.self_text import mixed_self_text
    from nmexport.models.loader import load_tokenizer

    tokenizer = load_tokenizer(given.inputs.source)
    generate = mixed_self_text(
        given.model, tokenizer, progress=given.inputs.progress, label="fold: own text"
    )
    return generate(samples, length, seed)


def _checkpoint(given: _Given, work: str, *, of: str = "") -> Checkpoint | None:
    """Where long work goes on from after a kill; the folder belongs to this stage's key.

    Args:
        given: Names the folder.
        work: Which work.
        of: What it depends on beside the key, such as what an effort means in this version.
    """
    from nmexport.calibration.checkpoint import Checkpoint

    folder = given.inputs.resume
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoint(folder / f"{work}.safetensors", identity=folder.name + of)


def _folded(given: _Given, made: _Made, name: str) -> dict[str, torch.Tensor]:
    """Tensors of one linear, as they are written; folding is the same everywhere: on the CPU."""
    import torch

    from nmexport.sparsity.learned import fold_learned
    from nmexport.sparsity.linear import fold
    from nmexport.sparsity.quantisation import quantised

    section = given.inputs.recipe.model
    dtype, one = getattr(torch, section.dtype), made.derived[name]
    with given.loaded(given.linears[name]) as loaded:
        linear = _on_cpu(loaded)
        if made.learned is None:
            folded = fold(linear, one.behaviour, one.constants, dtype=dtype)
        else:
            corrections = made.learned.corrections[name]
            folded = fold_learned(linear, one.behaviour, one.constants, corrections, dtype=dtype)
    _check_finite(name, folded, section.dtype)
    return quantised(folded, section.weights, name=name)


def _on_cpu(linear: nn.Linear) -> nn.Linear:
    """The linear itself, or a copy of one that is elsewhere."""
    from copy import deepcopy

    return linear if linear.weight.device.type == "cpu" else deepcopy(linear).to("cpu")


def _write_tensors(given: _Given, made: _Made) -> None:
    from nmexport.store.tensors import ShardedWriter

    inputs = given.inputs
    with ShardedWriter(inputs.output) as writer:
        for name in inputs.progress.track(
            made.derived, label="fold: weights", total=len(made.derived)
        ):
            folded = _folded(given, made, name)
            writer.add({f"{name}.{kind}": tensor for kind, tensor in folded.items()})


def _check_finite(name: str, folded: Mapping[str, torch.Tensor], dtype: str) -> None:
    for kind, tensor in folded.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{kind} of {name} is not finite in {dtype} once folded.",
                fix="use --dtype bfloat16 or float32"
                if dtype == "float16"
                else "check the weights",
            )


def _layer_spec(name: str, linear: nn.Linear, made: _Made) -> LayerSpec:
    from nmexport.sparsity.linear import bias_of

    derived, error, distance = made.derived[name], made.errors[name], made.distances.get(name)
    section, behaviour, constants = derived.section, derived.behaviour, derived.constants
    remainder = constants.remainder
    return LayerSpec(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        pattern=section.pattern,
        criterion=section.criterion,
        mitigations=section.mitigations,
        grouping=section.grouping,
        phase=section.phases,
        dynamic_shift=behaviour.dynamic_shift,
        variance_correction=behaviour.variance_correction,
        has_bias=bias_of(linear) is not None,
        relative_error=_rounded(
            error.relative_error(1.0 if constants.nu is None else constants.nu)
        ),
        gap_closed=None if distance is None else _rounded(distance.closed()),
        remainder_rank=None if remainder is None else remainder.inner.shape[1],
    )


def _written_learning(folder: Path, learned: Learned | None) -> dict[str, Any]:
    """Write the loss curve; the stage's metrics of it."""
    import json
    from dataclasses import asdict

    if learned is None:
        return {}
    document = {"settings": asdict(learned.settings), "curve": asdict(learned.curve)}
    (folder / LEARNING).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return {
        "steps": len(learned.curve.learned),
        "held_out_kl": [learned.curve.held_out[place][1] for place in (0, -1)]
        if learned.curve.held_out
        else None,
    }


def _rounded(value: float | None) -> float | None:
    """Six digits: what follows is the summation order of the machine."""
    return None if value is None else float(f"{value:.6g}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
