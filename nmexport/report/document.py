"""Put the sections of a verification together, and judge them by the recipe's gates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nmexport.report.gates import evaluate, verdict
from nmexport.report.model import (
    MIXED,
    Calibration,
    ModelFacts,
    Report,
    Weights,
    json_of,
    report_from,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe
    from nmexport.report.model import (
        Accuracy,
        EngineFacts,
        Latency,
        Memory,
        Parity,
        Sparsity,
        StoredDense,
    )
    from nmexport.store.allocation import Allocation
    from nmexport.store.kept import KeptWeights
    from nmexport.store.layers import ModelPhases


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that a verification measured, and what stages before it noted down."""

    sparsity: Sparsity
    accuracy: Accuracy
    parity: Parity
    latency: Latency
    memory: Memory
    stored_dense: StoredDense | None = None
    """None where weights are float, or nothing dense was exported."""
    engine: EngineFacts | None = None
    """None where ONNX Runtime runs the model."""
    allocation: Allocation | None = None
    """None where all linears are alike."""
    calibration: Calibration = field(default_factory=Calibration)
    kept: KeptWeights | None = None
    """What is kept of a checkpoint that came quantised; None where it did not, or is rounded."""


def assemble(
    *,
    recipe: Recipe,
    source: ModelSource,
    parameters: int,
    target: str,
    environment: Environment,
    measured: Measured,
    notes: Sequence[str],
    phases: ModelPhases | None = None,
) -> Report:
    """Make a report, with no gate judged yet (see `judge`).

    Args:
        recipe: What was built.
        source: The model that was found.
        parameters: Number of the dense model's parameters.
        target: The runtime that was measured.
        environment: The machine it was measured on.
        measured: The figures.
        notes: What a reader must know beside the figures.
        phases: When the model is sparse; None is as the recipe says.
    """
    sparsity = recipe.sparsity
    report = Report(
        model=ModelFacts(id=source.id, revision=source.revision, parameters=parameters),
        pattern=str(sparsity.pattern) if measured.allocation is None else MIXED,
        criterion=sparsity.criterion,
        mitigations=tuple(sparsity.mitigations),
        grouping=sparsity.grouping,
        phases=phases or sparsity.phases,
        weights=Weights(dense=recipe.model.dtype, sparse=sparse_weights(recipe, measured)),
        target=target,
        verdict="none",
        **vars(measured),
        notes=tuple(notes),
        environment=environment,
        recipe=recipe.model_dump(mode="json", by_alias=True),
        command="nmexport build --recipe resolved.yaml --work DIR",
    )
    # As a reader of the file will have it: NumPy's scalars are numbers, NaN is None.
    return report_from(json_of(report))


def sparse_weights(recipe: Recipe, measured: Measured) -> str:
    """Describe how the sparse model's weights are stored."""
    form, kept = recipe.model.weights, measured.kept
    chosen = {} if measured.allocation is None else measured.allocation.count_forms()
    if chosen:
        return " and ".join(recipe.model.dtype if one == "float" else one for one in chosen)
    if form not in {"auto", "float"}:
        return form
    return recipe.model.dtype if kept is None else f"{kept.method}'s own"


def weights_note(
    recipe: Recipe,
    kept: KeptWeights | None,
    allocation: Allocation | None,
    *,
    alone: bool,
) -> str | None:
    """Say what a reader must know of how weights are stored.

    Args:
        recipe: What was built.
        kept: What is kept of a checkpoint that came quantised.
        allocation: What a budget chose; None where all linears are alike.
        alone: There is no dense model to compare with.
    """
    chosen = {} if allocation is None else allocation.count_forms()
    if chosen:
        head = "float" if recipe.forms.head is None else str(recipe.forms.head)
        counts = ", ".join(f"{count} in {form}" for form, count in chosen.items())
        beside = "" if alone else " Dense in the same forms stands beside the dense model."
        return (
            f"The budget chose how each linear's weights are stored: {counts}; output head and "
            f"input embedding are in {head}.{beside}"
        )
    if kept is not None:
        dense = f" The dense model holds the same numbers in {recipe.model.dtype}."
        return f"{kept.sentence()}." + ("" if alone else dense)
    if recipe.model.weights in {"auto", "float"} or alone:
        return None
    return (
        f"The sparse model's weights are {recipe.model.weights}, the dense model's "
        f"{recipe.model.dtype}: accuracy, speed and memory compare sparsity and quantisation "
        "together with neither. The dense model in the same integers stands between them."
    )


def judge(report: Report, recipe: Recipe) -> Report:
    """Apply the recipe's gates to a report."""
    results = evaluate(report, recipe.gates)
    return replace(report, gates=tuple(results), verdict=verdict(results))
