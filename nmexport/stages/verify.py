"""Stage `verify`: measure what was built against the dense model, and write the report.

Every figure comes from the shipped ONNX files on the engine's runtime; torch only takes part in the
parity legs that name it. A gate that does not hold does not stop the stage: the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.calibration import corpus
from nmexport.errors import RecipeError
from nmexport.models.context import check_lengths
from nmexport.report.model import read_report
from nmexport.stages.engine import resolve_target
from nmexport.verification import suite

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.recipe import Recipe
    from nmexport.report.model import Report
    from nmexport.stages.inputs import StageInputs

UPSTREAM = ("fold", "export", "engine")

# Said by content in place of by name.
_NOT_KEYS = {"corpus", "tasks", "tasks_path", "task_limit", "task_fewshot"}


@dataclass(frozen=True)
class Artifact:
    """A finished verification."""

    path: Path

    @property
    def report(self) -> Report:
        """`report.json`.

        Raises:
            ArtifactError: if it is missing or not a report of this schema.
        """
        return read_report(self.path / "report.json")


def key_fields(inputs: StageInputs) -> dict[str, object]:
    """How it is measured, on what, and where.

    Raises:
        RecipeError: if a gate or task needs the dense baseline, which the recipe leaves out, or
            something is longer than the model's context: said before anything runs.
    """
    recipe, environment = inputs.recipe, inputs.environment
    _check_comparable(recipe)
    check_lengths(inputs.source, recipe, measured=True)
    return {
        "target": resolve_target(recipe.target),
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude=_NOT_KEYS),
        "suite": suite.identity(suite.Suite.of(recipe.evaluation)),
        "corpus": corpus.corpus_identity(recipe.evaluation.corpus),
        "latency": recipe.latency.model_dump(mode="json"),
        "gates": recipe.gates.model_dump(mode="json"),
        "seed": recipe.seed,
        "device": environment.cpu,
        "cores": environment.cores,
        "packages": {name: environment.version(name) for name in ("onnxruntime", "torch")},
    }


def _check_comparable(recipe: Recipe) -> None:
    needs = [
        name.replace("_", "-")
        for name, limit in recipe.gates
        if limit is not None and name != "max_peak_rss_bytes"
    ]
    if recipe.evaluation.tasks or recipe.evaluation.tasks_path:
        needs.append("tasks")
    if needs and not recipe.model.dense_baseline:
        raise RecipeError(
            f"Without the dense baseline there is nothing to hold {', '.join(needs)} against.",
            fix="leave out --no-dense-baseline, or the gates and tasks",
        )


def check(inputs: StageInputs) -> None:
    """Refuse text or tasks that cannot be measured on; see `verifying.check`."""
    from nmexport.stages import verifying

    verifying.check(inputs)


def run(inputs: StageInputs) -> dict[str, object]:
    """Measure everything and write the report; see `verifying.run`."""
    from nmexport.stages import verifying

    return verifying.run(inputs)
