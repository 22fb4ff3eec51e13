"""`report.json`: every figure of a verification, in one document of a fixed shape."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError
from nmexport.report import learning
from nmexport.report.gates import evaluate, verdict
from nmexport.store.artifact import plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe
    from nmexport.store.layers import ModelPhases

SCHEMA = 1
_SECTIONS = ("model", "sparsity", "accuracy", "parity", "latency", "memory", "recipe")
MIXED = "mixed patterns"
"""`pattern` of a report whose linears have patterns of their own: see its `allocation`."""


def read_report(path: Path) -> dict[str, Any]:
    """Read `report.json`.

    Raises:
        ArtifactError: if there is none, or it is no report of this schema.
    """
    fix = "make one with `nmexport build` or `nmexport verify`"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"The report {path} cannot be read: {error.strerror}.", fix=fix
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no report: it is not JSON ({error}).", fix=fix) from error
    if not isinstance(report, dict) or not {"schema", "verdict"} <= report.keys():
        raise ArtifactError(
            f"{path} is no report: it is other JSON.", allowed="a report.json of nmexport", fix=fix
        )
    wrong = [name for name in _SECTIONS if not isinstance(report.get(name) or {}, dict)]
    if wrong or not _are_gates(report.get("gates") or []):
        raise ArtifactError(
            f"{path} is no report that can be read: {(*wrong, 'gates')[0]} is not what it should "
            "be.",
            fix=fix,
        )
    if report["schema"] != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {report['schema']}.", allowed=f"schema {SCHEMA}", fix=fix
        )
    return report


def _are_gates(rows: object) -> bool:
    keys = {"name", "limit", "value", "passed"}
    return isinstance(rows, list) and all(
        isinstance(row, dict) and keys <= row.keys() and _is_number(row["limit"]) for row in rows
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def assemble(
    *,
    recipe: Recipe,
    source: ModelSource,
    parameters: int,
    target: str,
    environment: Environment,
    sparsity: Mapping[str, Any],
    accuracy: Mapping[str, Any],
    parity: Mapping[str, Any],
    latency: Mapping[str, Any],
    memory: Mapping[str, Any],
    notes: list[str],
    engine: Mapping[str, Any] | None = None,
    allocation: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    phases: ModelPhases | None = None,
) -> dict[str, Any]:
    """Put the sections in their order, with no gate judged yet (see `judge`).

    Args:
        recipe: What was built.
        source: The model that was found.
        parameters: Of the dense model.
        target: The runtime that was measured.
        environment: The machine it was measured on.
        sparsity: See `audit.sparsity`.
        accuracy: See `accuracy.compare`, with `dataset`.
        parity: See `parity.compare`.
        latency: See `latency.compare`.
        memory: `peak_rss_bytes`, `device_bytes`, `artifact_bytes`.
        notes: What a reader must know beside the figures.
        engine: See `engine_words.section`; None where ONNX Runtime runs the model.
        allocation: See `nmexport.store.allocation.as_dict`; None where all linears are alike.
        calibration: See `learning.section`.
        phases: When the model is sparse; None is as the recipe says.
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"id": source.id, "revision": source.revision, "parameters": parameters},
        "pattern": str(recipe.sparsity.pattern) if allocation is None else MIXED,
        "criterion": recipe.sparsity.criterion,
        "mitigations": list(recipe.sparsity.mitigations),
        "grouping": recipe.sparsity.grouping,
        "phases": phases or recipe.sparsity.phases,
        "weights": {"dense": recipe.model.dtype, "sparse": sparse_weights(recipe)},
        "target": target,
        "verdict": "none",
        "gates": [],
        "sparsity": sparsity,
        "allocation": allocation,
        "calibration": calibration or learning.section(None, []),
        "accuracy": accuracy,
        "parity": parity,
        "latency": latency,
        "memory": memory,
        "engine": engine,
        "notes": notes,
        "environment": environment.as_dict(),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "command": "nmexport build --recipe resolved.yaml --work DIR",
    }
    finite: dict[str, Any] = plain(report)
    return finite


def sparse_weights(recipe: Recipe) -> str:
    """How the sparsified linears' weights are stored."""
    form = recipe.model.weights
    return recipe.model.dtype if form == "float" else form


def weights_note(recipe: Recipe) -> str | None:
    """Return a note where the two models store their weights in different ways."""
    if recipe.model.weights == "float":
        return None
    return (
        f"Sparsified weights are {recipe.model.weights}, the dense model's {recipe.model.dtype}: "
        "accuracy, speed and memory compare sparsity and quantisation together with neither. "
        "Built with --weights float, the same recipe shows sparsity alone."
    )


def judge(report: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The report with the recipe's gates applied and the verdict they yield."""
    results = evaluate(report, recipe.gates)
    gates = [plain(gate.as_dict()) for gate in results]
    return {**report, "gates": gates, "verdict": verdict(results)}
