"""`nmexport sweep`: many recipes and baselines side by side, from one file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmexport.cli.output import (
    console,
    emit_json,
    json_option,
    progress,
    table,
    verbose_option,
    wants_json,
)
from nmexport.cli.verb import UserPath, Verb, Words
from nmexport.errors import UserError

if TYPE_CHECKING:
    from nmexport.sweep.cluster import Cluster
    from nmexport.sweep.outcome import Results
    from nmexport.sweep.plan import Job, Sweep
    from nmexport.sweep.row import Row

_ROOT = Path("nmexport-work")


def _sweep_names() -> list[str]:
    from nmexport.sweep.plan import names

    return names()


# \b keeps click from joining the lines of a paragraph.
_HELP = """Measure every cell of a sweep file: recipes over models, and baselines.

Results are kept: the same command resumes where it stopped. Writes sweep.json, sweep.md and
a plot for each model.

\b
A file, in YAML:
  schema: 1
  models: [smollm2]                     # recipe names, Hub ids, folders
  recipe: {calibration: {samples: 32}}  # over each model's own recipe
  grid:                                 # every combination is a cell; or a list of grids
    sparsity.pattern: ["2:4", "8:16"]
    sparsity.criterion: [act, wina]
  cells:                                # more cells, one by one
    - {sparsity.pattern: "8:16", sparsity.mitigations: [var]}
  baselines: [activations 50%, weights 50%, weights 8:16]
  measure: accuracy                     # or build: all stages, speed as well
"""


@click.command(
    "sweep",
    cls=Verb,
    help=_HELP,
    short_help="Measure patterns, criteria, models and baselines side by side.",
)
@click.argument("sweep", metavar="FILE|NAME", type=Words(_sweep_names, files=True))
@click.option(
    "--work",
    type=UserPath(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for the results.  [default: nmexport-work/sweep-NAME]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A recipe key for every cell, such as evaluation.corpus=test.txt. Repeatable.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Run on a Ray cluster, a model a task: auto, HOST:PORT, or local. Every node must see "
    "the work directory.",
)
@click.option(
    "--ray-cpus",
    "cpus",
    type=click.IntRange(min=1),
    metavar="COUNT",
    help="CPUs of a node for a task.  [default: a node's, shared by its GPUs]",
)
@click.option(
    "--ray-gpus",
    "gpus",
    type=click.FloatRange(min=0),
    metavar="COUNT",
    help="GPUs for a task; below 1, tasks share one.  [default: 1 where there are any]",
)
@click.option("--dry-run", is_flag=True, help="List the cells; run nothing.")
@json_option
@verbose_option
@click.pass_context
def sweep_command(
    ctx: click.Context,
    *,
    sweep: str,
    work: Path | None,
    settings: tuple[str, ...],
    address: str | None,
    cpus: int | None,
    gpus: float | None,
    dry_run: bool,
) -> None:
    from nmexport.sweep import plan

    if address is None and (cpus is not None or gpus is not None):
        raise click.UsageError("--ray-cpus and --ray-gpus need --ray ADDRESS.", ctx)
    planned = plan.load(plan.find(sweep), _overrides(settings))
    root = work or _ROOT / f"sweep-{planned.name}"
    jobs = _jobs(planned, root)
    if dry_run:
        _show_plan(ctx, jobs)
        return
    results = _run(planned, jobs, root, _cluster(address, cpus, gpus))
    if wants_json(ctx):
        emit_json(results.as_json())
    else:
        _show(results, root)
    reasons = [row.refused for row in results.rows]
    if reasons and all(reasons):
        raise UserError(f"Nothing was measured: {reasons[0]}", fix="change the sweep's cells")


def _overrides(settings: tuple[str, ...]) -> dict[str, object]:
    """Read `--set` as recipe keys; values are YAML, so 3 is a number and [var] a list."""
    from nmexport import strict_yaml
    from nmexport.errors import RecipeError

    values = {}
    for setting in settings:
        key, given, value = setting.partition("=")
        if not given or not key:
            raise RecipeError(f"--set cannot be {setting!r}.", allowed="KEY=VALUE")
        values[key] = strict_yaml.read(f"value: {value}", f"--set {key}").value["value"]
    return values


def _jobs(planned: Sweep, root: Path) -> list[Job]:
    from nmexport.sweep.plan import Job, folders

    return [
        Job(
            model=model,
            folder=(root / name).absolute(),
            cells=planned.cells[model],
            measure=planned.measure,
        )
        for model, name in folders(planned).items()
    ]


def _cluster(address: str | None, cpus: int | None, gpus: float | None) -> Cluster:
    from nmexport.sweep.cluster import RayCluster, ThisMachine

    if address is None:
        return ThisMachine(progress())
    return RayCluster(address, cpus=cpus, gpus=gpus)


def _run(planned: Sweep, jobs: list[Job], root: Path, cluster: Cluster) -> Results:
    """Run the jobs; write the results after each."""
    from nmexport.environment import probe
    from nmexport.sweep import outcome
    from nmexport.sweep.plan import folders

    rows: dict[str, list[Row]] = {}
    results = outcome.Results(sweep=planned, rows=(), environment=probe())
    root.mkdir(parents=True, exist_ok=True)
    for job, measured in cluster.run(jobs):
        rows[job.model] = measured
        in_order = [row for model in planned.cells for row in rows.get(model, [])]
        results = replace(results, rows=tuple(in_order))
        outcome.write(results, folders(planned), root)
    return results


def _show_plan(ctx: click.Context, jobs: list[Job]) -> None:
    rows = [
        {
            "model": job.model,
            "pattern": None if cell.baseline else str(cell.recipe.sparsity.pattern),
            "cell": cell.label,
            "refused": cell.refused,
        }
        for job in jobs
        for cell in job.cells
    ]
    if wants_json(ctx):
        emit_json({"cells": rows})
        return
    names = ("model", "pattern", "cell", "refused")
    listed = [[row[name] for name in names] for row in rows]
    console().print(table(f"{len(rows)} cells", names, listed, left=names))


def _show(results: Results, root: Path) -> None:
    from nmexport.sweep.outcome import HEADINGS, columns

    out = console()
    for model in results.models:
        rows = [columns(row) for row in results.rows_of(model)]
        out.print(table(model, HEADINGS, rows, left=("pattern",)))
    out.print(f"In {root}: sweep.md, sweep.json", soft_wrap=True, markup=False)
