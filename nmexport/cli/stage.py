"""`nmexport calibrate`, `fold`, `export`, `engine`, `verify`, `package`: one stage each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
from nmexport.cli.recipe_options import OF_STAGE
from nmexport.cli.verb import Verb

if TYPE_CHECKING:
    from nmexport.choices import Stage
    from nmexport.cli.request import Request

_ABOUT: dict[Stage, str] = {
    "calibrate": "Gather statistics of the linears on calibration text.",
    "fold": "Turn statistics into weights and constants.",
    "export": "Write the ONNX model, sparse and dense.",
    "engine": "Make the exported model ready to run on the target.",
    "verify": "Measure accuracy and speed; write the report.",
    "package": "Write what a server needs to serve the engine.",
}


def _command_of(stage: Stage) -> click.Command:
    @click.command(
        stage,
        cls=Verb,
        short_help=_ABOUT[stage],
        help=f"{_ABOUT[stage]}\n\nThe stages before it must be complete.",
    )
    @click.option("--force", is_flag=True, help="Rerun even if the stage is complete.")
    @click.option("--dry-run", is_flag=True, help="Say what would run and why; write nothing.")
    @takes(*OF_STAGE[stage], continues=stage != "calibrate")
    @click.pass_context
    def command(ctx: click.Context, *, asked: Request, force: bool, dry_run: bool) -> None:
        from nmexport.cli import running
        from nmexport.selection import Selection

        forced = frozenset({stage} if force else ())
        selection = Selection(first=stage, last=stage, force=forced)
        if dry_run:
            running.show_plan(ctx, asked.pipeline(), selection)
        else:
            running.run(ctx, asked.pipeline(), selection)

    return command


calibrate_command = _command_of("calibrate")
fold_command = _command_of("fold")
export_command = _command_of("export")
engine_command = _command_of("engine")
verify_command = _command_of("verify")
package_command = _command_of("package")
