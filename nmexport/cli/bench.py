"""`nmexport bench`: kernels and engines, dense against sparse, interleaved in one run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
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
from nmexport.cli.verb import VerbFamily

if TYPE_CHECKING:
    from nmexport.bench.kernel_graphs import Dtype
    from nmexport.bench.kernels import Row
    from nmexport.cli.request import Request
    from nmexport.report.model import DecodeTimes, PhaseTimes


@click.group("bench", cls=VerbFamily, short_help="Time kernels or engines, dense against sparse.")
def bench_command() -> None:
    """Time kernels or engines, dense against sparse, interleaved in one run."""


@bench_command.command(
    "engines", short_help="Time the dense and the sparse engine of a work directory."
)
@click.option("--prefill-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--decode-context", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Batch size of decode."
)
@click.option("--runs", type=click.IntRange(3), default=30, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=3, show_default=True)
@takes()
@click.pass_context
def engines_command(
    ctx: click.Context,
    *,
    asked: Request,
    prefill_tokens: int,
    decode_context: int,
    batch: int,
    runs: int,
    warmup: int,
) -> None:
    """Time the dense and the sparse engine of a work directory."""
    from nmexport.bench.engines import bench_engines
    from nmexport.store.records import json_from

    work = asked.existing_work()
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
        emit_json({"work": str(work.root), "runs": runs, "latency": json_from(latency)})
        return
    sides = {"dense": latency.dense, "sparse": latency.sparse}
    if latency.stored is not None:
        sides["dense in integers"] = latency.stored
    rows = [
        *(
            (f"prefill {name}", *_phase_row(side.prefill), None, None)
            for name, side in sides.items()
        ),
        *(
            (f"decode {name}", *_phase_row(side.decode), *_device_row(side.decode))
            for name, side in sides.items()
        ),
    ]
    columns = ["", "p50 ms", "p90 ms", "p99 ms", "tokens/s", "GPU ms", "host us"]
    if all(side.decode.device_ms is None for side in sides.values()):
        columns, rows = columns[:-2], [row[:-2] for row in rows]
    out = console()
    title = f"{latency.runtime} on {latency.device}, {runs} runs each, interleaved"
    out.print(table(title, columns, rows))
    speedup = latency.speedup
    out.print(
        f"Sparse is {figure(speedup.prefill, 2, 'x')} as fast in prefill and "
        f"{figure(speedup.decode, 2, 'x')} in decode."
    )
    if (over := latency.over_stored) is not None:
        out.print(
            f"Against dense in the same integers it is {figure(over.prefill, 2, 'x')} as fast in "
            f"prefill and {figure(over.decode, 2, 'x')} in decode."
        )


def _phase_row(times: PhaseTimes) -> tuple[str, ...]:
    return (
        figure(times.p50_ms, 2),
        figure(times.p90_ms, 2),
        figure(times.p99_ms, 2),
        figure(times.tokens_per_s, 1),
    )


def _device_row(times: DecodeTimes) -> tuple[str, str]:
    return figure(times.device_ms, 3), figure(times.host_us, 0)


@bench_command.command("kernels", short_help="Time native kernels against dense products.")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="KxO",
    help="in_features x out_features, such as 576x1536. Repeatable.  [default: SmolLM2's]",
)
@click.option(
    "--llm", "all_shapes", is_flag=True, help="Use the shapes of 1B to 8B models; takes gigabytes."
)
@click.option(
    "--tokens",
    multiple=True,
    type=int,
    help="Number of tokens: 1 is decode, many are prefill. Repeatable.  [default: 1, 128; 1 to 4 "
    "with --llm]",
)
@click.option(
    "--threads",
    multiple=True,
    type=int,
    help="Number of threads. Repeatable.  [default: 1; 1 and 2 with --llm]",
)
@click.option("--pattern", default="8:16", show_default=True, metavar="N:M")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["float32", "float16", "bfloat16", "int8", "int8:128"]),
    help="Element type of the weights; int8:128 has a scale for every 128 channels. Repeatable.  "
    "[default: float32; with --llm also bfloat16 and int8]",
)
@click.option("--grouped", is_flag=True, help="Use a channel order, as balanced grouping does.")
@click.option(
    "--rivals/--no-rivals",
    default=True,
    show_default=True,
    help="Also time dense int8 and int4 weights (MatMulNBits).",
)
@click.option(
    "--seconds", type=float, default=2.0, show_default=True, help="Minimum time for each row."
)
@json_option
@verbose_option
@click.pass_context
def kernels_command(
    ctx: click.Context,
    *,
    shapes: tuple[str, ...],
    all_shapes: bool,
    tokens: tuple[int, ...],
    threads: tuple[int, ...],
    pattern: str,
    dtypes: tuple[Dtype, ...],
    grouped: bool,
    rivals: bool,
    seconds: float,
) -> None:
    """Time the native kernels against dense products, with the bandwidth they reach."""
    from nmexport.bench.kernels import (
        LLM_SHAPES,
        SMOLLM2_SHAPES,
        KernelSettings,
        bench_kernels,
    )
    from nmexport.sparsity.pattern import NMPattern

    tokens = tokens or ((1, 2, 3, 4) if all_shapes else (1, 128))
    threads = threads or ((1, 2) if all_shapes else (1,))
    dtypes = dtypes or (("float32", "bfloat16", "int8") if all_shapes else ("float32",))
    outcome = bench_kernels(
        [shape_from(text) for text in shapes] or (LLM_SHAPES if all_shapes else SMOLLM2_SHAPES),
        tokens,
        KernelSettings(
            threads=threads,
            pattern=NMPattern.parse(pattern),
            dtypes=dtypes,
            grouped=grouped,
            rivals=rivals,
            seconds=seconds,
        ),
    )
    if wants_json(ctx):
        emit_json(outcome.as_json())
        return
    out = console()
    for dtype in dtypes:
        title = (
            f"{outcome.runtime}, {outcome.variant}, {outcome.pattern}, {dtype} weights; "
            "medians in microseconds, interleaved, weights out of cache"
        )
        out.print(table(title, _KERNEL_COLUMNS, [_row(row, dtype) for row in outcome.results]))
    out.print(
        "speed: over the faster dense product of the same weights; read: of what a loop reads"
    )


_KERNEL_COLUMNS = (
    "linear",
    "tokens",
    "threads",
    "MatMul f32",
    "dense int8",
    "dense int4",
    "ours dense",
    "sparse",
    "speed",
    "GB/s",
    "of read",
    "select",
    "runs",
)


def _row(row: Row, dtype: Dtype) -> tuple[str | int, ...]:
    def median(side: str) -> str:
        timing = row.sides.get(side)
        return figure(timing.median_us if timing else None, 1)

    own = row.figures[dtype]
    return (
        f"{row.in_features}x{row.out_features}",
        row.tokens,
        row.threads,
        *(
            median(side)
            for side in ("matmul", "nbits8", "nbits4", f"dense_{dtype}", f"sparse_{dtype}")
        ),
        figure(own.ratio, 2, "x"),
        figure(own.kept_gb_per_s, 1),
        f"{own.share_of_read:.0%}",
        f"{own.selection_share:.1%}",
        row.runs,
    )


def shape_from(text: str) -> tuple[int, int]:
    """Read `576x1536`.

    Raises:
        RecipeError: if it is not two whole numbers joined by an x.
    """
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    if match is None:
        from nmexport.errors import RecipeError

        raise RecipeError(f"--shape cannot be {text!r}.", allowed="KxO, such as 576x1536")
    return int(match[1]), int(match[2])


def _add_other_commands() -> None:
    from nmexport.cli.bench_cuda import cuda_command
    from nmexport.cli.bench_rivals import rivals_command
    from nmexport.cli.bench_serving import serve_command, soak_command

    for command in (serve_command, soak_command, cuda_command, rivals_command):
        bench_command.add_command(command)


_add_other_commands()
