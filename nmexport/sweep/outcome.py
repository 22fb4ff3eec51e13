"""Write a sweep's results: `sweep.json`, `sweep.md`, and a plot for each model."""

from __future__ import annotations

import collections
import json
from typing import TYPE_CHECKING, Any

from nmexport.report.figures import number, percent
from nmexport.report.plots import svg_from
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from nmexport.environment import Environment
    from nmexport.sweep.plan import Sweep

SCHEMA = 1
PROTOCOL = (
    "Both models run in torch on the same fixed windows, which do not overlap; a window is scored "
    "from its second token. The ratio is sparse over dense perplexity, its standard error over "
    "windows, paired. Baselines are plain magnitude, uncalibrated: `activations` keeps each "
    "token's largest inputs wherever they lie, `weights` prunes once and for all."
)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#5b6470")
_MARKERS = "os^Dv<>P"
_GREY = "#5b6470"
_PLOT_WIDTH, _PLOT_HEAD, _PLOT_LINE = 6.6, 1.1, 0.24  # inches
# How far right of the largest ratio the axis ends.
_ROOM = 1.15
# Ticks of the ratio's logarithmic axis: those that it reaches.
_FINE_TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)


def document(
    sweep: Sweep, rows: Sequence[Mapping[str, Any]], environment: Environment
) -> dict[str, Any]:
    """`sweep.json`."""
    return {
        "schema": SCHEMA,
        "name": sweep.name,
        "measure": sweep.measure,
        "models": list(sweep.cells),
        "rows": [dict(row) for row in rows],
        "protocol": PROTOCOL,
        "environment": environment.as_dict(),
    }


def markdown(results: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """`sweep.md`: a table and a plot for each model.

    Args:
        results: See `document`.
        plots: File name of each model's plot.
    """
    parts = [f"# Sweep {results['name']}", "", results["protocol"]]
    for model in results["models"]:
        rows = [row for row in results["rows"] if row["model"] == model]
        parts += ["", f"## {model}", "", *_dense_line(rows)]
        if model in plots:
            parts += [f"![Perplexity ratio of each pattern on {model}]({plots[model]})", ""]
        speeds = any("speedup" in row for row in rows)
        parts += _table(rows, speeds=speeds)
    return "\n".join(parts) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], model: str) -> str | None:
    """A row of points for each combination, best first, baselines below; None of nothing."""
    measured = [row for row in rows if "refused" not in row]
    if not measured:
        return None
    sparse = [row for row in measured if row["baseline"] is None]
    patterns = sorted({row["pattern"] for row in sparse}, key=_order)
    lines = [*_rank(sparse, "label"), *_rank(_baselines(measured), "baseline")]
    # A baseline far off (weights pruned 2:4, in small models) must not press all else together.
    end = _ROOM * max(row["perplexity_ratio"] for row in sparse or measured)

    def draw(axes: Axes) -> None:
        places = {label: place for place, label in enumerate(lines)}
        for index, pattern in enumerate(patterns):
            _points(
                axes,
                [(row, places[row["label"]]) for row in sparse if row["pattern"] == pattern],
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                label=pattern,
            )
        own = [(row, places[row["baseline"]]) for row in _baselines(measured)]
        _points(axes, own, color=_GREY, marker="x", label="baseline")
        for row, place in own:
            if row["perplexity_ratio"] > end:
                beyond = f"{number(row['perplexity_ratio'])} \N{RIGHTWARDS ARROW}"
                axes.annotate(beyond, (end, place), ha="right", va="center", color=_GREY)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xscale("log")
        _set_range(axes, min(1.0, *(row["perplexity_ratio"] for row in measured)), end)
        axes.set_xlabel("perplexity, times dense")
        axes.figure.legend(loc="outside upper left", ncols=len(patterns) + 1, handletextpad=0.2)

    return svg_from(
        draw,
        title=f"Perplexity ratio of each combination on {model}",
        size=(_PLOT_WIDTH, _PLOT_HEAD + _PLOT_LINE * len(lines)),
    )


def write(results: Mapping[str, Any], names: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the files; returns their paths.

    Args:
        results: See `document`.
        names: A name fit for a file, by model.
        folder: Where; it exists.
    """
    plots, written = {}, []
    for model in results["models"]:
        svg = plot([row for row in results["rows"] if row["model"] == model], model)
        if svg is not None:
            plots[model] = f"sweep-{names[model]}.svg"
            written.append(_put(folder / plots[model], svg))
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    written.append(_put(folder / "sweep.json", text))
    written.append(_put(folder / "sweep.md", markdown(results, plots)))
    return written


def columns(row: Mapping[str, Any]) -> list[str]:
    """A row's cells: what, pattern, perplexity, ratio, KL, agreement."""
    what = [row["label"], row["pattern"] or ""]
    if "refused" in row:
        return [*what, "refused", row["refused"], "", ""]
    error = row["perplexity_ratio_stderr"]
    ratio = f"{number(row['perplexity_ratio'])}{'' if error is None else f' ± {number(error, 2)}'}"
    return [
        *what,
        number(row["perplexity"]["sparse"]),
        ratio,
        number(row["kl_mean"], 3),
        percent(row["top1_agreement"]),
    ]


HEADINGS = ("what", "pattern", "perplexity", "times dense", "KL, nats", "top-1 agreement")


def _table(rows: Sequence[Mapping[str, Any]], *, speeds: bool) -> list[str]:
    headings = [*HEADINGS, *(["decode speed"] if speeds else [])]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        speed = row.get("speedup")
        more = [f"{speed['decode']:.2f}x" if speed else ""] if speeds else []
        lines.append("| " + " | ".join([*columns(row), *more]) + " |")
    return lines


def _dense_line(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    measured = [row for row in rows if "perplexity" in row]
    if not measured:
        return []
    first = measured[0]
    return [
        f"Dense perplexity {number(first['perplexity']['dense'])}, {first['tokens']:,} tokens.",
        "",
    ]


def _baselines(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["baseline"] is not None]


def _rank(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """Labels, the one with the lowest ratio first: at the pattern that most rows have."""
    patterns = collections.Counter(row["pattern"] for row in rows)
    best: dict[str, tuple[int, float]] = {}
    for row in rows:
        rank = (patterns[row["pattern"]], -row["perplexity_ratio"])
        best[row[key]] = max(rank, best.get(row[key], rank))
    return sorted(best, key=lambda label: -best[label][1])


def _points(axes: Axes, placed: Sequence[tuple[Mapping[str, Any], int]], **style: Any) -> None:
    """Ratios with their standard errors, each at the place of its line."""
    axes.errorbar(
        [row["perplexity_ratio"] for row, _ in placed],
        [place for _, place in placed],
        xerr=[row["perplexity_ratio_stderr"] or 0.0 for row, _ in placed],
        linestyle="none",
        markersize=5,
        elinewidth=1,
        **style,
    )


def _set_range(axes: Axes, low: float, high: float) -> None:
    ticks = _FINE_TICKS if high < _FINE_TICKS[-1] else _TICKS
    axes.set_xlim(low / 1.02, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _order(pattern: str) -> tuple[float, int]:
    """Densest last, small groups first."""
    parsed = NMPattern.parse(pattern)
    return parsed.density, parsed.m


def _put(path: Path, text: str) -> Path:
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
