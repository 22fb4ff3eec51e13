"""`nmexport build`: every stage that is not up to date, then the figures."""

from __future__ import annotations

import click

from nmexport.cli.options import recipe_options, request


@click.command("build", short_help="Run all stages that are not up to date.")
@click.option("--from", "first", metavar="STAGE", help="Start here; earlier stages must be there.")
@click.option("--to", "last", metavar="STAGE", help="Stop after this stage.")
@click.option(
    "--force", multiple=True, metavar="STAGE", help="Run it although it is complete. Repeatable."
)
@click.option("--dry-run", is_flag=True, help="Say what would run and why; write nothing.")
@click.option("--check", is_flag=True, help="Compare every cached file with its digest.")
@recipe_options
@click.pass_context
def build_command(
    ctx: click.Context,
    *,
    first: str | None,
    last: str | None,
    force: tuple[str, ...],
    dry_run: bool,
    check: bool,
) -> None:
    """Run all stages: calibrate, fold, export, engine, verify, package.

    What is up to date is not run again; a killed build goes on where it stopped.
    """
    from nmexport.cli import running
    from nmexport.pipeline import STAGES, Selection

    order = list(STAGES)
    selection = Selection(
        first=first or order[0], last=last or order[-1], force=frozenset(force), check=check
    )
    if dry_run:
        running.show_plan(ctx, request(ctx).pipeline(), selection)
    else:
        running.run(ctx, request(ctx).pipeline(), selection)
