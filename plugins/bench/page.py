"""Writes the page of CPU measurements beside this file: one command measures and writes.

    python plugins/bench/page.py --work SmolLM2=WORK --work "Llama 1B=FOLDER/work"

`WORK` is a work directory whose engine is built (for a random model of 1 billion parameters, see
`plugins/bench/scale.py`); without any only kernels are measured. Everything that is measured is
written, losses too. Each part is kept once it is measured: a run that was cut off goes on after it,
on the same machine with the same library. `--from FILE` writes the page again from kept figures.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmexport.bench.engines import bench_engines
from nmexport.bench.kernels import LLM_SHAPES, SMOLLM2_SHAPES, KernelSettings, bench_kernels
from nmexport.environment import probe
from nmexport.progress import Silent, on_stream
from nmexport.report.plots import svg_from
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.native import engine_library, require_library
from nmexport.store.artifact import file_digest
from nmexport.store.work_directory import WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
PAGE, FIGURES, CHART = HERE / "README.md", HERE / "cpu.json", HERE / "cpu.svg"
KEPT = HERE / "cpu.partial.json"
DTYPES = ("float32", "bfloat16", "int8")
COLOURS = {"float32": "#0072b2", "bfloat16": "#009e73", "int8": "#d55e00"}
PROMPTS = (128, 512)
# Timed runs of each model and phase; of a model beyond this size, fewer: a prompt takes seconds.
RUNS, FEW_RUNS = 30, 8
LARGE_BYTES = 1_000_000_000


class Kept:
    """Parts of a measurement in a file, so that none is taken twice."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        """Go on from the file where it is of this machine and library."""
        self._path, self._identity = path, dict(identity)
        self._parts: dict[str, Any] = {}
        if path.is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["identity"] == self._identity:
                self._parts = document["parts"]

    def part(self, name: str, measured: Callable[[], Any]) -> Any:
        """A part from the file, or measured now and kept."""
        if name not in self._parts:
            self._parts[name] = measured()
            document = {"identity": self._identity, "parts": self._parts}
            self._path.write_text(json.dumps(document), encoding="utf-8")
        return self._parts[name]


def measure(
    works: Mapping[str, Path], *, seconds: float, shapes: Sequence[tuple[int, int]], kept: Path
) -> dict[str, Any]:
    """All figures of the page; a quarter of an hour with the shapes of large models."""
    for work in works.values():  # of another build of the library: better said now than last
        engine_library(read_engine(work / "engine" / "current"))
    environment = probe()
    identity = {
        "cpu": environment.cpu,
        "library": file_digest(require_library()),
        "seconds": str(seconds),
    }
    parts = Kept(kept, identity)
    kernels = [
        parts.part(
            f"kernels {shape}",
            lambda shape=shape: bench_kernels(
                [shape],
                (1, 2, 3, 4),
                KernelSettings(threads=(1, 2), dtypes=DTYPES, seconds=seconds),
            ).as_json(),
        )
        for shape in on_stream(sys.stderr).track(shapes, label="kernels", total=len(shapes))
    ]
    prompts = parts.part(
        "prompts",
        lambda: bench_kernels(
            SMOLLM2_SHAPES,
            PROMPTS,
            KernelSettings(threads=(2,), grouped=True, rivals=False, seconds=seconds),
        ).as_json(),
    )
    models = [
        parts.part(f"model {name} {path}", lambda name=name, path=path: measure_model(name, path))
        for name, path in on_stream(sys.stderr).track(
            works.items(), label="models", total=len(works)
        )
    ]
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "cpu": environment.cpu,
        "cores": environment.cores,
        "runtime": prompts["runtime"],
        "variant": prompts["variant"],
        "kernels": [row for outcome in kernels for row in outcome["results"]],
        "prompts": prompts["results"],
        "models": models,
    }


def measure_model(name: str, work: Path) -> dict[str, Any]:
    """`nmexport bench engines` at each prompt length, and what it was measured on."""
    recipe = WorkDirectory(work).recipe()
    model = read_engine(work / "engine" / "current").model
    size = model.with_name(f"{model.name}.data").stat().st_size
    runs = FEW_RUNS if size > LARGE_BYTES else RUNS
    return {
        "name": name,
        "dtype": recipe.model.dtype,
        "weights": recipe.model.weights,
        "pattern": str(recipe.sparsity.pattern),
        "mitigations": list(recipe.sparsity.mitigations),
        "bytes": size,
        "runs": runs,
        "latency": [
            bench_engines(work, prefill_tokens=tokens, runs=runs, progress=Silent())
            for tokens in PROMPTS
        ],
    }


def page(figures: dict[str, Any]) -> str:
    """The page's Markdown."""
    return "\n".join(
        [
            "# CPU measurements",
            "",
            f"**{figures['cpu']}**, {figures['cores']} cores; kernels in {figures['variant']};",
            f"{figures['runtime']}; {figures['date']}.",
            "",
            "```sh",
            "python plugins/bench/page.py --work NAME=WORK",
            "```",
            "",
            "writes this page, its chart and all figures ([cpu.json](cpu.json)). By hand they are",
            "`nmexport bench kernels --llm --tokens 1 --tokens 2 --tokens 3 --tokens 4 --threads 1",
            "--threads 2 --dtype float32 --dtype bfloat16 --dtype int8 --json` and, for each",
            "model, `nmexport bench engines --work WORK --json`.",
            "",
            "![Speed of 8:16 over dense, one token, by shape and type of weights](cpu.svg)",
            "",
            "Medians in microseconds, 10th and 90th percentile in brackets. All sides of a row",
            "take turns in one run, each on so many weights that they come from memory. *Speed* is",
            "the faster dense product of the same weights over 8:16; *read* is the rate at which",
            "kept weights are read, and its share of what a loop reads that does nothing else.",
            "",
            *_models(figures["models"]),
            *_decode(figures["kernels"]),
            *_tokens(figures["kernels"]),
            *_prompts(figures["prompts"]),
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
        yield ""


def _decode_row(row: dict[str, Any], dtype: str) -> str:
    own = row[dtype]
    cells = [
        _shape(row),
        dtype,
        *(_time(row, side) for side in ("matmul", "nbits8", "nbits4", f"dense_{dtype}")),
        _time(row, f"sparse_{dtype}"),
        f"{own['ratio']:.2f}x",
        f"{own['kept_gb_per_s']:.1f} GB/s, {own['share_of_read']:.0%}",
        f"{own['selection_share']:.1%}",
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


def _models(models: Sequence[dict[str, Any]]) -> Iterable[str]:
    if not models:
        return
    yield from (
        "## Whole models",
        "",
        "Milliseconds a step, all layers and the output head; the interval holds 95 % of",
        "resamples. The dense side is always a float model in the type beside it: a row of int8",
        "weights shows what both together gain, not sparsity alone; one of 16:16, which keeps",
        "every channel, what int8 gains by itself.",
        "",
    )
    yield "| model | weights, dense and sparse | step | dense | sparse | speed | interval |"
    yield "|---|---|---|---:|---:|---:|---:|"
    for model in models:
        short, *_ = model["latency"]
        context = short["dense"]["decode"]["context"]
        yield _model_row(model, short, "decode", f"token after {context}")
        for latency in model["latency"]:
            tokens = latency["dense"]["prefill"]["tokens"]
            yield _model_row(model, latency, "prefill", f"prompt of {tokens}")
    yield ""
    for model in models:
        parts = " + ".join(model["mitigations"]) or "no mitigation"
        yield f"- {model['name']}: {model['pattern']}, {parts}; {model['runs']} runs of each side"
    yield ""


def _model_row(model: dict[str, Any], latency: dict[str, Any], phase: str, step: str) -> str:
    low, high = latency["speedup"][f"{phase}_interval"]
    dense, sparse = (latency[side][phase]["p50_ms"] for side in ("dense", "sparse"))
    speed = latency["speedup"][phase]
    sides = model["dtype"]
    sides += f", {model['weights'] if model['weights'] != 'float' else model['dtype']}"
    return (
        f"| {model['name']} | {sides} | {step} | {dense:.2f} | {sparse:.2f} | {speed:.2f}x "
        f"| {low:.2f} to {high:.2f} |"
    )


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """Speeds of one token as bars from the line where nothing is gained: losses go left."""
    chosen = [row for row in rows if row["tokens"] == 1]
    names = [f"{_shape(row)}, {row['threads']} thr." for row in chosen]
    height = 0.8 / len(DTYPES)

    def draw(axes: Axes) -> None:
        for place, dtype in enumerate(DTYPES):
            lines = [index + (place - 1) * height for index in range(len(chosen))]
            gains = [row[dtype]["ratio"] - 1 for row in chosen]
            axes.barh(lines, gains, height, left=1, color=COLOURS[dtype], label=dtype)
        axes.axvline(1, color="#1c2430", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("speed of 8:16 over the faster dense product of the same weights")
        axes.figure.legend(loc="outside upper left", ncols=len(DTYPES))
        axes.figure.set_size_inches(7.5, 1.2 + 0.42 * max(len(chosen), 1))
        axes.figure.set_facecolor("white")

    return svg_from(draw, title="Speed of 8:16 over dense, one token")


def _shape(row: dict[str, Any]) -> str:
    return f"{row['in_features']} x {row['out_features']}"


def _time(row: dict[str, Any], side: str) -> str:
    timing = row["sides"].get(side)
    if timing is None:
        return "-"
    return f"{timing['median_us']:.0f} ({timing['p10_us']:.0f} to {timing['p90_us']:.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or take kept figures, and write all three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a work directory with an engine; repeatable",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each row")
    parser.add_argument("--small", action="store_true", help="SmolLM2's shapes alone")
    parser.add_argument("--from", dest="kept", type=Path, help="figures to write the page from")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the files")
    options = parser.parse_args(arguments)
    into = {path.name: options.into / path.name for path in (PAGE, FIGURES, CHART, KEPT)}
    if options.kept:
        figures = json.loads(options.kept.read_text(encoding="utf-8"))
    else:
        shapes = SMOLLM2_SHAPES if options.small else LLM_SHAPES
        figures = measure(
            dict(map(_named_work, options.work)),
            seconds=options.seconds,
            shapes=shapes,
            kept=into[KEPT.name],
        )
    into[FIGURES.name].write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    into[CHART.name].write_text(chart(figures["kernels"]) + "\n", encoding="utf-8")
    into[PAGE.name].write_text(page(figures), encoding="utf-8")
    into[KEPT.name].unlink(missing_ok=True)


def _named_work(text: str) -> tuple[str, Path]:
    name, _, folder = text.rpartition("=")
    return name or Path(folder).name, Path(folder)


if __name__ == "__main__":
    main()
