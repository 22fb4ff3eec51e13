"""`nmexport diff`: what changed between two work directories, artifacts, models or reports."""

from __future__ import annotations

from pathlib import Path

import click

from nmexport.cli.output import (
    console,
    emit_json,
    is_verbose,
    json_option,
    verbose_option,
    wants_json,
)
from nmexport.cli.tables import show_value
from nmexport.cli.verb import UserPath, Verb


@click.command("diff", cls=Verb, short_help="Say what changed between two paths.")
@click.argument("before", type=UserPath(path_type=Path))
@click.argument("after", type=UserPath(path_type=Path))
@json_option
@verbose_option
@click.pass_context
def diff_command(ctx: click.Context, before: Path, after: Path) -> None:
    """Say what changed from BEFORE to AFTER: inputs, files, metrics, figures.

    Both are work directories, artifacts of one stage, ONNX files, or reports. What matters most
    comes first, and the rest is counted; -v shows all of it.
    """
    from nmexport.inspect.diff import compare, summary

    outcome = compare(before, after)
    if wants_json(ctx):
        emit_json(outcome)
    elif outcome["same"]:
        console().print(f"No difference: {before} and {after}", soft_wrap=True, markup=False)
    elif is_verbose(ctx):
        show_value(console(), {"differences": outcome["differences"]})
    else:
        shown, left_out = summary(outcome["differences"])
        if shown:
            show_value(console(), {"differences": shown})
        if left_out:
            counts = ", ".join(f"{count} in {where}" for where, count in left_out.items())
            console().print(
                f"{sum(left_out.values())} more differences: {counts}. -v shows them.",
                soft_wrap=True,
                markup=False,
            )
