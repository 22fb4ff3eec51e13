"""Writes a sweep's results: `sweep.json`, `sweep.md`, and a plot for each model."""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nmexport.report.figures import number, percent
from nmexport.report.plots import svg_from

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from nmexport.environment import Environment
    from nmexport.sparsity.pattern import NMPattern
    from nmexport.sweep.plan import Sweep
    from nmexport.sweep.row import Row

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


@dataclass(frozen=True, kw_only=True)
class Results:
    """The measurements of a sweep so far."""

    sweep: Sweep
    rows: tuple[Row, ...]
    environment: Environment

    @property
    def models(self) -> list[str]:
        """The models, in the sweep's order."""
        return list(self.sweep.cells)

    def rows_of(self, model: str) -> list[Row]:
        """Return the rows of one model."""
        return [row for row in self.rows if row.model == model]

    def as_json(self) -> dict[str, object]:
        """`sweep.json`."""
        return {
            "schema": SCHEMA,
            "name": self.sweep.name,
            "measure": self.sweep.measure,
            "models": self.models,
            "rows": [row.as_json() for row in self.rows],
            "protocol": PROTOCOL,
            "environment": self.environment.as_dict(),
        }


def markdown(results: Results, plots: Mapping[str, str]) -> str:
    """Write `sweep.md`: a table and a plot for each model.

    Args:
        results: What was measured.
        plots: File name of each model's plot.
    """
    parts = [f"# Sweep {results.sweep.name}", "", PROTOCOL]
    for model in results.models:
        rows = results.rows_of(model)
        parts += ["", f"## {model}", "", *_dense_line(rows)]
        if model in plots:
            parts += [f"![Perplexity ratio of each pattern on {model}]({plots[model]})", ""]
        speeds = any(row.figures and row.figures.speedup for row in rows)
        parts += _table(rows, speeds=speeds)
    return "\n".join(parts) + "\n"


class _Point(NamedTuple):
    """A measured row as it is drawn."""

    label: str
    pattern: NMPattern | None
    ratio: float
    error: float


def plot(rows: Sequence[Row], model: str) -> str | None:
    """Plot a row of points for each combination, best first, baselines below."""
    sparse, baselines = (
        _measured_points(rows, baselines=False),
        _measured_points(rows, baselines=True),
    )
    measured = [*sparse, *baselines]
    if not measured:
        return None
    patterns = sorted({point.pattern for point in sparse if point.pattern}, key=_order)
    lines = [*_rank(sparse), *_rank(baselines)]
    # A baseline far off (weights pruned 2:4, in small models) must not press all else together.
    end = _ROOM * max(point.ratio for point in sparse or measured)

    def draw(axes: Axes) -> None:
        places = {label: place for place, label in enumerate(lines)}
        for index, pattern in enumerate(patterns):
            _points(
                axes,
                [(point, places[point.label]) for point in sparse if point.pattern == pattern],
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                label=str(pattern),
            )
        own = [(point, places[point.label]) for point in baselines]
        _points(axes, own, color=_GREY, marker="x", label="baseline")
        for point, place in own:
            if point.ratio > end:
                beyond = f"{number(point.ratio)} \N{RIGHTWARDS ARROW}"
                axes.annotate(beyond, (end, place), ha="right", va="center", color=_GREY)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xscale("log")
        _set_range(axes, min(1.0, *(point.ratio for point in measured)), end)
        axes.set_xlabel("perplexity, times dense")
        axes.figure.legend(loc="outside upper left", ncols=len(patterns) + 1, handletextpad=0.2)

    return svg_from(
        draw,
        title=f"Perplexity ratio of each combination on {model}",
        size=(_PLOT_WIDTH, _PLOT_HEAD + _PLOT_LINE * len(lines)),
    )


def write(results: Results, names: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the files; returns their paths.

    Args:
        results: What was measured.
        names: A name fit for a file, by model.
        folder: Where; it exists.
    """
    plots, written = {}, []
    for model in results.models:
        svg = plot(results.rows_of(model), model)
        if svg is not None:
            plots[model] = f"sweep-{names[model]}.svg"
            written.append(_put(folder / plots[model], svg))
    text = json.dumps(results.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    written.append(_put(folder / "sweep.json", text))
    written.append(_put(folder / "sweep.md", markdown(results, plots)))
    return written


def columns(row: Row) -> list[str]:
    """List a row's cells: what, pattern, perplexity, ratio, KL, agreement."""
    what, figures = [row.label, str(row.pattern or "")], row.figures
    if figures is None:
        return [*what, "refused", row.refused or "", "", ""]
    error = figures.perplexity_ratio_stderr
    ratio = f"{number(figures.perplexity_ratio)}{'' if error is None else f' ± {number(error, 2)}'}"
    return [
        *what,
        number(figures.perplexity.sparse),
        ratio,
        number(figures.kl_mean, 3),
        percent(figures.top1_agreement),
    ]


HEADINGS = ("what", "pattern", "perplexity", "times dense", "KL, nats", "top-1 agreement")


def _table(rows: Sequence[Row], *, speeds: bool) -> list[str]:
    headings = [*HEADINGS, *(["decode speed"] if speeds else [])]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        speed = row.figures.speedup if row.figures else None
        told = f"{speed.decode:.2f}x" if speed and speed.decode is not None else ""
        more = [told] if speeds else []
        lines.append("| " + " | ".join([*columns(row), *more]) + " |")
    return lines


def _dense_line(rows: Sequence[Row]) -> list[str]:
    first = next((row.figures for row in rows if row.figures), None)
    if first is None:
        return []
    return [f"Dense perplexity {number(first.perplexity.dense)}, {first.tokens:,} tokens.", ""]


def _measured_points(rows: Sequence[Row], *, baselines: bool) -> list[_Point]:
    return [
        _Point(
            label=row.label,
            pattern=row.pattern,
            ratio=row.figures.perplexity_ratio,
            error=row.figures.perplexity_ratio_stderr or 0.0,
        )
        for row in rows
        if row.figures is not None and (row.baseline is not None) == baselines
    ]


def _rank(points: Sequence[_Point]) -> list[str]:
    """Labels, the one with the lowest ratio first: at the pattern that most points have."""
    patterns = collections.Counter(point.pattern for point in points)
    best: dict[str, tuple[int, float]] = {}
    for point in points:
        rank = (patterns[point.pattern], -point.ratio)
        best[point.label] = max(rank, best.get(point.label, rank))
    return sorted(best, key=lambda label: -best[label][1])


def _points(axes: Axes, placed: Sequence[tuple[_Point, int]], **style: Any) -> None:
    """Ratios with their standard errors, each at the place of its line."""
    axes.errorbar(
        [point.ratio for point, _ in placed],
        [place for _, place in placed],
        xerr=[point.error for point, _ in placed],
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


def _order(pattern: NMPattern) -> tuple[float, int]:
    """Densest last, small groups first."""
    return pattern.density, pattern.m


def _put(path: Path, text: str) -> Path:
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
