"""`nmexport inspect`: a work directory, an artifact, an ONNX file or a report in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmexport.cli.figures import show_report
from nmexport.cli.options import takes
from nmexport.cli.output import console, emit_json, is_verbose, wants_json
from nmexport.cli.tables import show_value
from nmexport.cli.verb import UserPath, Verb

if TYPE_CHECKING:
    from collections.abc import Sized
    from typing import TypeGuard

    from rich.console import Console

    from nmexport.cli.request import Request

_FEW = 24
_LONG = frozenset({"recipe", "report", "inputs", "environment"})


@click.command("inspect", cls=Verb, short_help="Describe an artifact, ONNX file or work directory.")
@click.argument("path", required=False, type=UserPath(path_type=Path))
@takes()
@click.pass_context
def inspect_command(ctx: click.Context, *, asked: Request, path: Path | None) -> None:
    """Say what PATH holds: a work directory, an artifact, an ONNX file or a report.

    Without PATH, the work directory that --work or --model names, or the last one built. -v shows
    all that is known.
    """
    from nmexport.inspect.describe import describe

    if path is not None and asked.work is not None:
        raise click.UsageError("PATH and --work name two things; give one of them.", ctx)
    description = describe(path if path is not None else asked.existing_work().root)
    if wants_json(ctx):
        emit_json(description)
    elif is_verbose(ctx):
        show_value(console(), description)
    else:
        _show_summary(console(), description)


def _show_summary(out: Console, description: dict[str, object]) -> None:
    """Print what fits a screen: the figures of a report, counts in place of long tables."""
    from nmexport.report.model import report_from

    path, report = Path(str(description["path"])), description.get("report")
    rest = {name: value for name, value in description.items() if name not in _LONG}
    short = {name: value for name, value in rest.items() if not _is_long(value)}
    counts = {name: f"{len(value)} rows" for name, value in rest.items() if _is_long(value)}
    if report is None or description["kind"] != "report":
        show_value(out, {**short, **counts})
    if isinstance(report, dict):
        show_report(out, report_from(report), path if path.is_dir() else path.parent)
    out.print("-v shows all that is known.")


def _is_long(value: object) -> TypeGuard[Sized]:
    return isinstance(value, list | dict) and len(value) > _FEW
