"""`nmexport estimate`: what a build would take on machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
from nmexport.cli.output import console, emit_json, size, table, wants_json
from nmexport.cli.verb import UserPath, Verb
from nmexport.progress import duration

if TYPE_CHECKING:
    from nmexport.cli.request import Request
    from nmexport.inspect.machines import Expected
    from nmexport.recipe import Recipe


@click.command("estimate", cls=Verb, short_help="Estimate memory and time on other machines.")
@click.argument("config", required=False, type=UserPath(path_type=Path))
@takes(continues=False)
@click.pass_context
def estimate_command(ctx: click.Context, *, asked: Request, config: Path | None) -> None:
    """Say what a build takes on a GPU of 24 GB, one of 80 GB, and a CPU.

    CONFIG is a model's config.json, or a folder with it; its weights need not be here. Default: the
    model of --model or --recipe. Memory is the peak up to the fold. Time covers all stages up to
    verify, and is good to a factor of two. `nmexport build --dry-run` says more about this machine.
    """
    from nmexport.inspect.estimate import shape_of
    from nmexport.inspect.machines import LAYER_BY_LAYER, MACHINES, expect
    from nmexport.models.skeleton import tensors_of_config

    recipe = _recipe(asked, config)
    where = config if config is not None else Path(recipe.model.id).expanduser()
    shape = shape_of(tensors_of_config(where))
    rows = [expect(recipe, shape, machine) for machine in MACHINES]
    if wants_json(ctx):
        emit_json({"parameters": shape.parameters, "machines": [dict(vars(row)) for row in rows]})
        return
    columns = ("machine", "calibrates and learns", "memory", "time")
    title = f"{recipe.model.id}, {shape.parameters / 1e9:.3g} billion parameters: estimates"
    out = console()
    out.print(table(title, columns, [_words(row) for row in rows], left=columns[:2]))
    if any(row.way == "layer by layer" for row in rows):
        out.print(f"A model that runs layer by layer needs text: {LAYER_BY_LAYER}", soft_wrap=True)
    if any(row.way == "not" for row in rows):
        out.print("Where it does not fit, build layer by layer: drop --budget", soft_wrap=True)


def _recipe(asked: Request, config: Path | None) -> Recipe:
    """Resolve the recipe; the defaults for a configuration that comes without a model's name."""
    if config is None or asked.model is not None or asked.file is not None:
        return asked.recipe()
    folder = config if config.is_dir() else config.parent
    return replace(asked, model=str(folder.absolute())).recipe()


def _words(row: Expected) -> tuple[str, ...]:
    if row.way == "not":
        return row.machine, "does not fit", "", ""
    return row.machine, row.way, size(row.memory_bytes), duration(row.seconds)
