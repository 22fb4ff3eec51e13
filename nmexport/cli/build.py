"""`nmexport build`: every stage that is not up to date, then the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nmexport.choices import Stage
from nmexport.cli.options import takes
from nmexport.cli.recipe_options import BUILD
from nmexport.cli.verb import OneOf, Verb

if TYPE_CHECKING:
    from nmexport.cli.request import Request


@click.command("build", cls=Verb, short_help="Run all stages that are not up to date.")
@click.option(
    "--from", "first", type=OneOf(Stage), help="First stage; those before it must be complete."
)
@click.option("--to", "last", type=OneOf(Stage), help="Stop after this stage.")
@click.option(
    "--force",
    type=OneOf(Stage),
    multiple=True,
    help="Rerun this stage even if it is complete. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Say what would run and why; write nothing.")
@click.option("--check", is_flag=True, help="Compare every cached file with its digest.")
@takes(*BUILD, continues=False)
@click.pass_context
def build_command(
    ctx: click.Context,
    *,
    asked: Request,
    first: str | None,
    last: str | None,
    force: tuple[str, ...],
    dry_run: bool,
    check: bool,
) -> None:
    """Run all stages: calibrate, fold, export, engine, verify, package.

    Stages that are up to date are skipped; a killed build resumes where it stopped.
    """
    from nmexport.cli import running
    from nmexport.selection import STAGES, Selection

    order = list(STAGES)
    selection = Selection(
        first=first or order[0], last=last or order[-1], force=frozenset(force), check=check
    )
    if dry_run:
        running.show_plan(ctx, asked.pipeline(), selection)
    else:
        running.run(ctx, asked.pipeline(), selection)
