"""`nmexport inspect`: a work directory, an artifact, an ONNX file or a report in words."""

from __future__ import annotations

from pathlib import Path

import click

from nmexport.cli.options import Request, takes
from nmexport.cli.output import console, emit_json, wants_json
from nmexport.cli.verb import Verb


@click.command("inspect", cls=Verb, short_help="An artifact, ONNX file or work directory in words.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@takes()
@click.pass_context
def inspect_command(ctx: click.Context, *, asked: Request, path: Path | None) -> None:
    """Say what PATH holds: a work directory, an artifact, an ONNX file or a report.

    Without PATH, the work directory that --work or --model names, or the last one built.
    """
    from nmexport.cli.tables import show_value
    from nmexport.inspect.describe import describe

    found = describe(path if path is not None else asked.existing_work().root)
    if wants_json(ctx):
        emit_json(found)
    else:
        show_value(console(), found)
