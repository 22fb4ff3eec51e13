"""`nmexport bench`: kernels and engines, dense against sparse, interleaved in one run."""

from __future__ import annotations

import re
from typing import Literal

import click

from nmexport.cli.options import reading_options, request
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


@click.group("bench", short_help="Time kernels or engines, dense against sparse.")
def bench_command() -> None:
    """Time kernels or engines, dense against sparse, interleaved in one run."""


@bench_command.command("engines", short_help="Dense against sparse engine of a work directory.")
@click.option("--prefill-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--decode-context", type=click.IntRange(1), default=128, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Of decode.")
@click.option("--runs", type=click.IntRange(3), default=30, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True)
@reading_options
@click.pass_context
def engines_command(
    ctx: click.Context,
    *,
    prefill_tokens: int,
    decode_context: int,
    batch: int,
    runs: int,
    warmup: int,
) -> None:
    """Time the dense and the sparse engine of a work directory."""
    from nmexport.generation import bench_engines

    work = request(ctx).existing_work()
    work.require("engine")
    latency = bench_engines(
        work.root,
        prefill_tokens=prefill_tokens,
        decode_context=decode_context,
        batch=batch,
        runs=runs,
        warmup=warmup,
        progress=progress(),
    )
    if wants_json(ctx):
        emit_json({"work": str(work.root), "runs": runs, "latency": latency})
        return
    rows = []
    for phase in ("prefill", "decode"):
        for side in ("dense", "sparse"):
            times = latency[side][phase]
            rows.append(
                (
                    f"{phase} {side}",
                    figure(times["p50_ms"], 2),
                    figure(times["p90_ms"], 2),
                    figure(times["p99_ms"], 2),
                    figure(times["tokens_per_s"], 1),
                )
            )
    out = console()
    title = f"{latency['runtime']} on {latency['device']}, {runs} runs each, interleaved"
    out.print(table(title, ("", "p50 ms", "p90 ms", "p99 ms", "tokens/s"), rows))
    speedup = latency["speedup"]
    out.print(
        f"Sparse is {figure(speedup['prefill'], 2, 'x')} as fast in prefill and "
        f"{figure(speedup['decode'], 2, 'x')} in decode."
    )


@bench_command.command("kernels", short_help="Native kernels against dense products.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="KxO",
    help="in_features x out_features, such as 576x1536. Repeatable.  [default: SmolLM2's]",
)
@click.option(
    "--tokens",
    multiple=True,
    type=int,
    default=(1, 128),
    show_default=True,
    help="1 is decode, many are prefill. Repeatable.",
)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--pattern", default="8:16", show_default=True, metavar="N:M")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True
)
@click.option("--grouped", is_flag=True, help="With a channel order, as balanced grouping has.")
@click.option(
    "--seconds", type=float, default=2.0, show_default=True, help="Least time for each row."
)
@json_option
@verbose_option
@click.pass_context
def kernels_command(
    ctx: click.Context,
    *,
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    threads: int,
    pattern: str,
    dtype: Literal["float32", "float16"],
    grouped: bool,
    seconds: float,
) -> None:
    """Time the native kernels against dense products, with the bandwidth they reach."""
    from nmexport.bench import SMOLLM2_SHAPES, bench_kernels
    from nmexport.sparsity.pattern import NMPattern

    outcome = bench_kernels(
        [_shape(text) for text in shapes] or SMOLLM2_SHAPES,
        tokens,
        threads=threads,
        pattern=NMPattern.parse(pattern),
        dtype=dtype,
        grouped=grouped,
        seconds=seconds,
    )
    if wants_json(ctx):
        emit_json(outcome)
        return
    rows = [
        (
            f"{row['in_features']}x{row['out_features']}, {row['tokens']} tokens",
            *(figure(row[side]["median_us"], 1) for side in ("matmul", "own_dense", "sparse")),
            figure(row["ratio"], 2, "x"),
            figure(row["kept_gb_per_s"], 1),
            row["runs"],
        )
        for row in outcome["results"]
    ]
    title = (
        f"{outcome['runtime']}, {outcome['variant']}, {outcome['threads']} threads, "
        f"{outcome['pattern']}, {outcome['dtype']}; medians in microseconds, interleaved"
    )
    columns = ("linear", "MatMul", "ours dense", "sparse", "speed", "kept GB/s", "runs")
    console().print(table(title, columns, rows))


def _shape(text: str) -> tuple[int, int]:
    """Read `576x1536`.

    Raises:
        RecipeError: if it is not two whole numbers joined by an x.
    """
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if match is None:
        from nmexport.errors import RecipeError

        raise RecipeError(f"--shape cannot be {text!r}.", allowed="KxO, such as 576x1536")
    return int(match[1]), int(match[2])
