"""Runs a pipeline for a person: shows the plan before, the outcome and figures after."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from nmexport.cli.figures import show_report
from nmexport.cli.output import console, emit_json, size, table, wants_json
from nmexport.errors import EnvironmentFault, GateFailed
from nmexport.progress import duration
from nmexport.store.artifact import KEY_CHARS

if TYPE_CHECKING:
    from pathlib import Path

    import click
    from rich.console import Console

    from nmexport.inspect.estimate import Estimate
    from nmexport.pipeline import Pipeline
    from nmexport.report.model import Report
    from nmexport.selection import Selection, StageRefused, Step

_NOT_RUN = {"cached": "up to date", "refused": "refused"}


def run(ctx: click.Context, pipeline: Pipeline, selection: Selection) -> None:
    """Build, then show what a person wants to see.

    Raises:
        GateFailed: if the verification's verdict is `fail`; after everything was shown.
    """
    from nmexport.selection import StageRefused

    refusal: StageRefused | None = None
    _check_room(pipeline, selection)
    try:
        steps = pipeline.run(selection)
    except StageRefused as error:  # shown with the figures that say why
        refusal, steps = error, error.steps
    document, report = _report(pipeline.work.root) if "verify" in selection.stages else (None, None)
    if wants_json(ctx):
        emit_json(
            {
                "work": str(pipeline.work.root),
                "up_to_date": all(step.action == "cached" for step in steps),
                "stages": [step.as_dict() for step in steps],
                "report": document,
            }
        )
    else:
        _show_outcome(pipeline, steps, report)
    if refusal is not None:
        raise refusal
    if report is not None and report.verdict == "fail":
        raise GateFailed(f"failed: {', '.join(report.failed_gates)}")


def _check_room(pipeline: Pipeline, selection: Selection) -> None:
    """Say what the stages will take, before the first one runs; nothing where none does.

    Raises:
        EnvironmentFault: if the disk has too little room for all of them.
    """
    from nmexport.inspect.estimate import estimate

    steps = pipeline.plan(selection)
    if all(step.action == "cached" for step in steps):
        return
    expected = estimate(pipeline.recipe, pipeline.source, steps, pipeline.work.root)
    pipeline.progress.note(_in_words(expected, pipeline))
    if expected.write_bytes > expected.free_bytes:
        raise EnvironmentFault(
            f"The build writes about {size(expected.write_bytes)}, and "
            f"{size(expected.free_bytes)} are free where {pipeline.work.root} is to be.",
            fix="choose another --work, end sooner with --to, or leave out the dense model with "
            "--no-dense-baseline",
        )


def _in_words(expected: Estimate, pipeline: Pipeline) -> str:
    unpacked = expected.unpacked_bytes
    kept = f", {size(unpacked)} of it the dequantised model," if unpacked else ""
    return (
        f"Writes about {size(expected.write_bytes)}{kept} to {pipeline.work.root} "
        f"({size(expected.free_bytes)} free); peak memory about {size(expected.memory_bytes)} "
        f"({size(pipeline.environment.memory_bytes)} here)."
    )


def show_plan(ctx: click.Context, pipeline: Pipeline, selection: Selection) -> None:
    """Say what is cached, what runs and why, and what it will take.

    Raises:
        UserError: what a build would refuse before its first stage runs.
    """
    from nmexport.inspect.estimate import estimate

    steps = pipeline.plan(selection)
    pipeline.check(steps)
    expected = estimate(pipeline.recipe, pipeline.source, steps, pipeline.work.root)
    if wants_json(ctx):
        emit_json(
            {
                "work": str(pipeline.work.root),
                "stages": [step.as_dict() for step in steps],
                "estimate": expected.as_dict(),
            }
        )
        return
    rows = [
        (step.stage, step.action, size(expected.bytes_by_stage.get(step.stage)), step.reason)
        for step in steps
    ]
    out = console()
    out.print(table(None, ("stage", "action", "size", "why"), rows, left=("action", "why")))
    out.print(_in_words(expected, pipeline), soft_wrap=True)


def _report(work: Path) -> tuple[dict[str, object] | None, Report | None]:
    """Read the report, as JSON and as a record; None where there is none."""
    from nmexport.report.model import read_document

    path = work / "report.json"
    return read_document(path) if path.is_file() else (None, None)


def _show_outcome(pipeline: Pipeline, steps: list[Step], report: Report | None) -> None:
    out = console()
    seconds = sum(step.seconds or 0.0 for step in steps)
    if all(step.action == "cached" for step in steps):
        out.print(f"Everything is up to date in {pipeline.work.root}.", soft_wrap=True)
    else:
        columns = ("stage", "took", "share", "memory", "size", "key")
        out.print(table(None, columns, [_outcome_row(step, seconds) for step in steps]))
    if report is not None:
        show_report(out, report, pipeline.work.root)
        _show_next(out, pipeline.work.root)
    else:
        out.print(f"In {pipeline.work.root}", soft_wrap=True)


def _show_next(out: Console, work: Path) -> None:
    """Print two commands to try."""
    given = shlex.quote(str(work))
    out.print(f'Try: nmexport generate --work {given} "Once upon a time"', soft_wrap=True)
    out.print(f"     nmexport serve {given}", soft_wrap=True)


def _outcome_row(step: Step, seconds: float) -> tuple[object, ...]:
    ran = step.seconds is not None
    return (
        step.stage,
        duration(step.seconds or 0.0) if ran else _NOT_RUN[step.action],
        f"{(step.seconds or 0.0) / max(seconds, 1e-9):.0%}" if ran else None,
        size(step.peak_memory_bytes),
        size(step.bytes),
        step.key[:KEY_CHARS],
    )
