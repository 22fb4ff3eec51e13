"""`nmexport diff`: what changed between two work directories, artifacts, models or reports."""

from __future__ import annotations

from pathlib import Path

import click

from nmexport.cli.output import console, emit_json, json_option, verbose_option, wants_json
from nmexport.cli.verb import Verb


@click.command("diff", cls=Verb, short_help="What changed between two of them.")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@json_option
@verbose_option
@click.pass_context
def diff_command(ctx: click.Context, before: Path, after: Path) -> None:
    """Say what changed from BEFORE to AFTER: inputs, files, metrics, figures.

    Both are work directories, artifacts of one stage, ONNX files, or reports.
    """
    from nmexport.cli.tables import show_value
    from nmexport.inspect.diff import compare

    outcome = compare(before, after)
    if wants_json(ctx):
        emit_json(outcome)
    elif outcome["same"]:
        console().print(f"No difference: {before} and {after}", soft_wrap=True, markup=False)
    else:
        show_value(console(), {"differences": outcome["differences"]})
