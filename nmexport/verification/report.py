"""`report.json`: every figure of a verification, in one document of a fixed shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.artifact import plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe

SCHEMA = 1


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
    """
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {"id": source.id, "revision": source.revision, "parameters": parameters},
        "pattern": str(recipe.sparsity.pattern),
        "criterion": recipe.sparsity.criterion,
        "mitigations": list(recipe.sparsity.mitigations),
        "grouping": recipe.sparsity.grouping,
        "phases": recipe.sparsity.phases,
        "target": target,
        "verdict": "none",
        "gates": [],
        "sparsity": sparsity,
        "accuracy": accuracy,
        "parity": parity,
        "latency": latency,
        "memory": memory,
        "notes": notes,
        "environment": environment.as_dict(),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "command": "nmexport build --recipe resolved.yaml --work DIR",
    }
    finite: dict[str, Any] = plain(report)
    return finite


def judge(report: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The report with the recipe's gates applied and the verdict they yield."""
    from nmexport.verification.gates import evaluate, verdict

    results = evaluate(report, recipe.gates)
    gates = [plain(gate.as_dict()) for gate in results]
    return {**report, "gates": gates, "verdict": verdict(results)}
