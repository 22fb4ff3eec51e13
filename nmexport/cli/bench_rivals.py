"""`nmexport bench rivals`: our engines beside what else runs the same shapes on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from nmexport.cli.options import takes
from nmexport.cli.output import console, emit_json, progress, table, wants_json
from nmexport.cli.verb import Verb

if TYPE_CHECKING:
    from nmexport.cli.request import Request
    from nmexport.report.model import Rivals

_COLUMNS = (
    "",
    "p50 ms",
    "p90 ms",
    "tokens/s",
    "GPU ms",
    "host us",
    "over rival",
    "not measured",
)


@click.command(
    "rivals", cls=Verb, short_help="Time a work directory's engines against torch.compile."
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Tokens in the cache of a decode step.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 4, 8),
    show_default=True,
    help="Sequences of a decode step. Repeatable.",
)
@click.option(
    "--prompt-tokens",
    "prompts",
    type=click.IntRange(2),
    multiple=True,
    default=(128, 512, 2048),
    show_default=True,
    help="Tokens of a prompt. Repeatable.",
)
@click.option("--no-prompts", is_flag=True, help="Time decode steps alone.")
@click.option(
    "--rival",
    "rivals",
    type=click.Choice(["dense", "int8"]),
    multiple=True,
    default=("dense", "int8"),
    show_default=True,
    help="Weights of torch.compile's model. Each takes a minute a case to compile. Repeatable.",
)
@click.option("--runs", type=click.IntRange(3), default=30, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True)
@takes()
@click.pass_context
def rivals_command(
    ctx: click.Context,
    *,
    asked: Request,
    context: int,
    batches: tuple[int, ...],
    prompts: tuple[int, ...],
    no_prompts: bool,
    rivals: tuple[Literal["dense", "int8"], ...],
    runs: int,
    warmup: int,
) -> None:
    """Time a work directory's engines against torch.compile with CUDA graphs, on the same shapes.

    Results are saved in WORK/rivals.json after each case, and shown in its report.
    """
    from nmexport.bench.rivals.bench import RivalOptions, bench_rivals
    from nmexport.report import rivals_file
    from nmexport.store.records import json_from

    work = asked.existing_work()
    engine = work.require("engine")
    options = RivalOptions(
        context=context,
        batches=tuple(dict.fromkeys(batches)),
        prompts=() if no_prompts else tuple(dict.fromkeys(prompts)),
        weights=tuple(dict.fromkeys(rivals)),
        runs=runs,
        warmup=warmup,
    )
    outcome = bench_rivals(
        engine,
        options,
        save=lambda measured: rivals_file.save(measured, work),
        progress=progress(),
    )
    is_shown = rivals_file.show(work)
    if wants_json(ctx):
        emit_json({"work": str(work.root), "rivals": json_from(outcome)})
        return
    _print(outcome)
    where = f"{work.root / 'report.html'} shows it too" if is_shown else "there is no report yet"
    console().print(f"Saved in {work.root / rivals_file.FILENAME}; {where}.")


def _print(outcome: Rivals) -> None:
    from itertools import groupby

    from nmexport.report import rival_rows

    out = console()
    out.print(rival_rows.words(outcome)[0])
    for case, rows in groupby(rival_rows.rows(outcome), key=lambda row: row.case):
        cells = [
            (row.name, row.p50, row.p90, row.rate, row.device, row.host, row.ratio, row.why)
            for row in rows
        ]
        failed = any(row[-1] for row in cells)
        columns = _COLUMNS if failed else _COLUMNS[:-1]
        out.print(
            table(case, columns, [row[: len(columns)] for row in cells], left=("not measured",))
        )
    out.print("over rival: times as fast as the fastest dense rival, by medians")
