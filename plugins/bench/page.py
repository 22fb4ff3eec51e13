"""Writes the page of CPU measurements beside this file: one command measures and writes.

    python plugins/bench/page.py --work WORK

`WORK` is a work directory whose engine is built; without it only kernels are measured. Everything
that is measured is written, losses too. `--from FILE` writes the page again from kept figures.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmexport.bench import LLM_SHAPES, SMOLLM2_SHAPES, bench_kernels
from nmexport.environment import probe
from nmexport.generation import bench_engines
from nmexport.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HERE = Path(__file__).resolve().parent
PAGE, FIGURES = HERE / "README.md", HERE / "cpu.json"
DTYPES = ("float32", "bfloat16", "int8")
BAR = 24  # characters of the longest bar


def measure(
    work: Path | None, *, seconds: float, shapes: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """All figures of the page; takes about half an hour with the shapes of large models."""
    environment = probe()
    kernels = [
        bench_kernels([shape], (1, 2, 3, 4), threads=(1, 2), dtypes=DTYPES, seconds=seconds)
        for shape in shapes
    ]
    prompts = bench_kernels(
        SMOLLM2_SHAPES, (128, 512), threads=(2,), grouped=True, rivals=False, seconds=seconds
    )
    engines = [
        bench_engines(work, prefill_tokens=tokens, progress=Silent())
        for tokens in ((128, 512) if work else ())
    ]
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "cpu": environment.cpu,
        "cores": environment.cores,
        "runtime": prompts["runtime"],
        "variant": prompts["variant"],
        "kernels": [row for outcome in kernels for row in outcome["results"]],
        "prompts": prompts["results"],
        "engines": engines,
    }


def page(figures: dict[str, Any]) -> str:
    """The page's Markdown."""
    return "\n".join(
        [
            "# CPU measurements",
            "",
            "Written by `python plugins/bench/page.py --work WORK`; the figures themselves are in",
            "[cpu.json](cpu.json). The kernels' are those of `nmexport bench kernels --llm",
            "--tokens 1 --tokens 2 --tokens 3 --tokens 4 --threads 1 --threads 2 --dtype float32",
            "--dtype bfloat16 --dtype int8 --json`, the models' those of `nmexport bench engines",
            "--work WORK --json`.",
            "",
            f"{figures['date']}, {figures['cpu']}, {figures['cores']} cores.",
            f"Kernels in {figures['variant']}, {figures['runtime']}.",
            "",
            "Medians in microseconds, 10th and 90th percentile in brackets. All sides of a row",
            "take turns in one run, each on so many weights that they come from memory. *Speed* is",
            "the faster dense product of the same weights over 8:16; *read* is the rate at which",
            "kept weights are read, and its share of what a loop reads that does nothing else.",
            "",
            *_decode(figures["kernels"]),
            *_tokens(figures["kernels"]),
            *_prompts(figures["prompts"]),
            *_models(figures["engines"]),
            "",
        ]
    )


def _decode(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield from ("## One token", "")
    for threads in sorted({row["threads"] for row in rows}):
        yield from (f"### {threads} thread{'s' if threads > 1 else ''}", "")
        yield (
            "| K x O | weights | MatMul f32 | int8 dense | int4 dense | ours dense | 8:16 | speed "
            "| read | select |"
        )
        yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        chosen = [row for row in rows if row["tokens"] == 1 and row["threads"] == threads]
        for row in chosen:
            for dtype in DTYPES:
                yield _decode_row(row, dtype)
        yield from ("", "Speed of 8:16 over the faster dense product:", "", "```")
        yield from _bars(
            (f"{_shape(row)} {dtype}", row[dtype]["ratio"]) for row in chosen for dtype in DTYPES
        )
        yield from ("```", "")


def _decode_row(row: dict[str, Any], dtype: str) -> str:
    own = row[dtype]
    cells = [
        _shape(row),
        dtype,
        *(_time(row, side) for side in ("matmul", "nbits8", "nbits4", f"dense_{dtype}")),
        _time(row, f"sparse_{dtype}"),
        f"{own['ratio']:.2f}x",
        f"{own['kept_gb_per_s']:.1f} GB/s, {own['share_of_read']:.0%}",
        f"{row['sides']['select']['median_us'] / row['sides'][f'sparse_{dtype}']['median_us']:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _tokens(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield from ("## Two to four tokens", "")
    yield "Each token keeps channels of its own: what they keep together nears everything. Speed"
    yield from ("over the faster dense product, float32:", "")
    yield "| K x O | threads | 1 | 2 | 3 | 4 |"
    yield "|---|---:|---:|---:|---:|---:|"
    by_place: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        by_place.setdefault((_shape(row), row["threads"]), {})[row["tokens"]] = row["float32"][
            "ratio"
        ]
    for (shape, threads), ratios in by_place.items():
        cells = " | ".join(f"{ratios[count]:.2f}x" for count in sorted(ratios))
        yield f"| {shape} | {threads} | {cells} |"
    yield ""


def _prompts(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    yield from ("## Prompts", "")
    yield from (
        "The linears of SmolLM2-135M as they are exported, float32, with a channel order:",
        "",
    )
    yield "| K x O | tokens | MatMul f32 | ours dense | 8:16 | speed |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        cells = [
            _shape(row),
            str(row["tokens"]),
            *(_time(row, side) for side in ("matmul", "dense_float32", "sparse_float32")),
            f"{row['float32']['ratio']:.2f}x",
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _models(engines: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not engines:
        return
    yield from (
        "## Whole models",
        "",
        "Milliseconds a step; the interval holds 95 % of resamples.",
        "",
    )
    yield "| | dense | 8:16 | speed | interval |"
    yield "|---|---:|---:|---:|---:|"
    for latency in engines:
        yield _model_row(latency, "prefill", f"prompt of {latency['dense']['prefill']['tokens']}")
    yield _model_row(
        engines[0], "decode", f"token after {engines[0]['dense']['decode']['context']}"
    )


def _model_row(latency: dict[str, Any], phase: str, title: str) -> str:
    low, high = latency["speedup"][f"{phase}_interval"]
    dense, sparse = (latency[side][phase]["p50_ms"] for side in ("dense", "sparse"))
    speed = latency["speedup"][phase]
    return f"| {title} | {dense:.2f} | {sparse:.2f} | {speed:.2f}x | {low:.2f} to {high:.2f} |"


def _bars(rows: Iterable[tuple[str, float]]) -> Iterable[str]:
    pairs = list(rows)
    longest = max((value for _, value in pairs), default=1.0)
    width = max((len(title) for title, _ in pairs), default=0)
    for title, value in pairs:
        yield f"{title:<{width}} {'#' * round(BAR * value / longest):<{BAR}} {value:.2f}"


def _shape(row: dict[str, Any]) -> str:
    return f"{row['in_features']} x {row['out_features']}"


def _time(row: dict[str, Any], side: str) -> str:
    timing = row["sides"].get(side)
    if timing is None:
        return "-"
    return f"{timing['median_us']:.0f} ({timing['p10_us']:.0f} to {timing['p90_us']:.0f})"


def main() -> None:
    """Measure, or take kept figures, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="a work directory with an engine")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for each row")
    parser.add_argument("--small", action="store_true", help="SmolLM2's shapes alone")
    parser.add_argument("--from", dest="kept", type=Path, help="figures to write the page from")
    options = parser.parse_args()
    if options.kept:
        figures = json.loads(options.kept.read_text(encoding="utf-8"))
    else:
        shapes = SMOLLM2_SHAPES if options.small else LLM_SHAPES
        figures = measure(options.work, seconds=options.seconds, shapes=shapes)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
