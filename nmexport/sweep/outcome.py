"""What a sweep found: `sweep.json`, `sweep.md`, and a plot for each model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nmexport.sparsity.pattern import NMPattern
from nmexport.verification.report_pages import number, percent
from nmexport.verification.report_plots import svg_from

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
_DASHES = ("--", ":", "-.", (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
_GREY = "#5b6470"


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


def markdown(found: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """`sweep.md`: a table and a plot for each model.

    Args:
        found: See `document`.
        plots: File name of each model's plot.
    """
    parts = [f"# Sweep {found['name']}", "", found["protocol"]]
    for model in found["models"]:
        rows = [row for row in found["rows"] if row["model"] == model]
        parts += ["", f"## {model}", "", *_dense_line(rows)]
        if model in plots:
            parts += [f"![Perplexity ratio of each pattern on {model}]({plots[model]})", ""]
        speeds = any("speedup" in row for row in rows)
        parts += _table(rows, speeds=speeds)
    return "\n".join(parts) + "\n"


def plot(rows: Sequence[Mapping[str, Any]], model: str) -> str | None:
    """Perplexity ratios over patterns, baselines as lines; None where nothing was measured."""
    measured = [row for row in rows if "refused" not in row]
    if not measured:
        return None
    sparse = [row for row in measured if row["baseline"] is None]
    patterns = sorted({row["pattern"] for row in sparse}, key=_order)
    places = {pattern: place for place, pattern in enumerate(patterns)}

    def draw(axes: Axes) -> None:
        variants = list(dict.fromkeys(row["label"] for row in sparse))
        for index, label in enumerate(variants):
            points = sorted(
                (places[row["pattern"]], row["perplexity_ratio"])
                for row in sparse
                if row["label"] == label
            )
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                linewidth=1.2,
                label=label,
            )
        for index, row in enumerate(row for row in measured if row["baseline"]):
            axes.axhline(
                row["perplexity_ratio"],
                color=_GREY,
                linewidth=1.2,
                linestyle=_DASHES[index % len(_DASHES)],
                label=row["baseline"],
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_ylabel("perplexity, times dense")
        if patterns:
            axes.set_xticks(range(len(patterns)), patterns)
        axes.figure.legend(loc="outside upper left", ncols=2, handlelength=2.2, fontsize=7.5)

    return svg_from(draw, title=f"Perplexity ratio of each pattern on {model}")


def write(found: Mapping[str, Any], names: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the files; returns their paths.

    Args:
        found: See `document`.
        names: A name fit for a file, by model.
        folder: Where; it exists.
    """
    plots, written = {}, []
    for model in found["models"]:
        svg = plot([row for row in found["rows"] if row["model"] == model], model)
        if svg is not None:
            plots[model] = f"sweep-{names[model]}.svg"
            written.append(_put(folder / plots[model], svg))
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    written.append(_put(folder / "sweep.json", text))
    written.append(_put(folder / "sweep.md", markdown(found, plots)))
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


def _order(pattern: str) -> tuple[float, int]:
    """Densest last, small groups first."""
    parsed = NMPattern.parse(pattern)
    return parsed.density, parsed.m


def _put(path: Path, text: str) -> Path:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path
