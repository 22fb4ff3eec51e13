"""`nmexport bench`: kernels and engines, dense against sparse, interleaved in one run."""

from __future__ import annotations

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
@json_option
@verbose_option
@click.pass_context
def kernels_command(ctx: click.Context) -> None:
    """Time the native kernels against dense products, with the bandwidth they reach."""
    from nmexport.bench import bench_kernels

    outcome = bench_kernels()
    if wants_json(ctx):
        emit_json(outcome)
        return
    from nmexport.cli.tables import show_value

    show_value(console(), outcome)
