"""`nmexport bench cuda`: kernels on a GPU, and the table of plans that they choose by."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from nmexport.cli.output import (
    console,
    emit_json,
    figure,
    json_option,
    progress,
    table,
    verbose_option,
    wants_json,
)
from nmexport.cli.verb import UserPath, Verb


@click.command("cuda", cls=Verb, short_help="Time CUDA kernels; regenerate the break-even table.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="KxO",
    help="in_features x out_features, such as 4096x6144. Repeatable.  [default: Mistral-7B's]",
)
@click.option(
    "--tokens",
    multiple=True,
    type=int,
    default=(1, 2, 3, 4),
    show_default=True,
    help="Number of tokens. Repeatable.",
)
@click.option(
    "--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True
)
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option(
    "--table",
    "table_file",
    type=UserPath(dir_okay=False, writable=True, path_type=Path),
    help="Write the fastest plans and break-even times here, as rows of the plan table.",
)
@click.option(
    "--save",
    is_flag=True,
    help="Prefer these measurements to the built-in table from now on; measuring again replaces "
    "them.",
)
@json_option
@verbose_option
@click.pass_context
def cuda_command(
    ctx: click.Context,
    *,
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    dtype: Literal["float16", "float32"],
    rounds: int,
    table_file: Path | None,
    save: bool,
) -> None:
    """Time the CUDA kernels through ONNX Runtime, dense next to sparse, on this machine's GPU."""
    from nmexport.bench.cuda import MISTRAL_SHAPES, SIDES, bench_cuda
    from nmexport.bench.cuda_plans import check_savable, save_plans
    from nmexport.cli.bench import shape_from
    from nmexport.runtimes.native import require_library

    library = require_library()
    if save:
        check_savable(library)
    outcome = bench_cuda(
        [shape_from(text) for text in shapes] or MISTRAL_SHAPES,
        tokens,
        dtype=dtype,
        rounds=rounds,
        library=library,
        note=progress().note,
    )
    if table_file is not None:
        table_file.write_text("\n".join(outcome["table"]) + "\n", encoding="utf-8")
    if save:
        progress().note(f"saved in {save_plans(library, outcome['table'])}")
    if wants_json(ctx):
        emit_json(outcome)
        return
    rows = [
        (
            row["label"],
            *(figure(row["us"][side], 1) for side in SIDES),
            figure(row["ratio"], 2, "x"),
        )
        for row in outcome["results"]
    ]
    what = f"{outcome['dtype']}, 8:16; medians in microseconds, weights cold, CUDA graphs"
    title = f"{outcome['gpu']}; {what}"
    columns = ("linear", "MatMul", "ours dense", "sparse", "mask + product", "speed")
    console().print(table(title, columns, rows))
