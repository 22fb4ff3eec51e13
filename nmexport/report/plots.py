"""The report's plots, as inline SVG; text stays text and takes the page's font."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from nmexport.report.allocation_rows import ReadShare
    from nmexport.report.model import Latency, LayerSparsity, PhaseName
    from nmexport.store.allocation import FrontPoint

    class Named(Protocol):
        """A figure of one linear."""

        @property
        def name(self) -> str:
            """Dotted name of the linear."""

    Row = TypeVar("Row", bound=Named)

# Okabe and Ito's colours: told apart by every kind of colour vision, and by lightness in print.
DENSE = "#5b6470"
SPARSE = "#0072b2"
_KINDS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6470", "#7a5195")
_MARKERS = "os^Dv<>P"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nmexport",  # element ids of equal plots are equal
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#c5cad3",
    "axes.labelcolor": "#3c4450",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_WIDTH, _HEIGHT = 5.2, 3.3  # inches: legible on a phone, two side by side on a desk
_LAYER = re.compile(r"\.(\d+)\.(?:.*\.)?([^.]+)$")


def layer_place(name: str, index: int) -> tuple[int, str]:
    """Return layer and kind of a linear: `model.layers.3.mlp.up_proj` is 3, `up_proj`.

    A name without a layer number stands at its `index` in the list.
    """
    match = _LAYER.search(name)
    if match is None:
        return index, name.rpartition(".")[2]
    return int(match[1]), match[2]


def svg_from(
    draw: Callable[[Axes], None], *, title: str, size: tuple[float, float] = (_WIDTH, _HEIGHT)
) -> str:
    """Write a plot as an `<svg>` element that scales with the page and has an accessible name."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        stream = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=empty)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def plot_by_layer(
    axes: Axes, layers: Sequence[Row], figure_of: Callable[[Row], float | None]
) -> None:
    """Plot a line of points for each kind of linear over the decoder's layers."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    for index, layer in enumerate(layers):
        place, kind = layer_place(layer.name, index)
        points = kinds.setdefault(kind, [])  # also where unmeasured: one colour in every plot
        value = figure_of(layer)
        if value is not None:
            points.append((place, value))
    for number, (kind, points) in enumerate(kinds.items()):
        axes.plot(
            [place for place, _ in points],
            [value for _, value in points],
            color=_KINDS[number % len(_KINDS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.1,
            label=kind,
        )
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("decoder layer")
    if kinds:
        axes.figure.legend(loc="outside upper left", ncols=4, handlelength=1.4, columnspacing=1.2)


def layer_error_svg(layers: Sequence[LayerSparsity]) -> str:
    """Plot the relative error of each sparsified linear's output in the running model."""

    def draw(axes: Axes) -> None:
        plot_by_layer(axes, layers, lambda layer: layer.relative_error)
        axes.set_ylabel("relative output error")
        axes.set_ylim(bottom=0)

    return svg_from(draw, title="Relative output error of each sparsified linear, by decoder layer")


def _in_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def layer_sparsity_svg(layers: Sequence[LayerSparsity]) -> str:
    """Plot the share of zeros that met each sparsified weight."""

    def draw(axes: Axes) -> None:
        plot_by_layer(axes, layers, lambda layer: _in_percent(layer.achieved))
        axes.set_ylabel("zeros that met the weight, %")
        low, high = axes.get_ylim()
        if high - low < 1:  # every layer exactly at the pattern: show that, not rounding
            axes.set_ylim((low + high) / 2 - 5, (low + high) / 2 + 5)

    return svg_from(draw, title="Achieved sparsity of each sparsified linear, by decoder layer")


def latency_svg(latency: Latency, phase: PhaseName) -> str:
    """Plot the cumulative distribution of a phase's runs, dense and sparse, with medians."""

    def draw(axes: Axes) -> None:
        sides = (("dense", latency.dense, DENSE, "--"), ("sparse", latency.sparse, SPARSE, "-"))
        for side, times, colour, dash in sides:
            figures = times.prefill if phase == "prefill" else times.decode
            samples = sorted(figures.samples_ms)
            if figures.p50_ms is None or not samples:
                continue
            label = f"{side}, median {figures.p50_ms:.3g} ms"
            axes.ecdf(samples, color=colour, linestyle=dash, linewidth=1.8, label=label)
            axes.plot([figures.p50_ms], [0.5], "o", color=colour, markersize=5)
        axes.set_xlabel(f"{phase}, milliseconds")
        axes.set_ylabel("share of runs within")
        axes.set_ylim(0, 1.02)
        axes.figure.legend(loc="outside upper left", ncols=2)

    return svg_from(draw, title=f"Distribution of {phase} latency, dense against sparse")


def front_svg(points: Sequence[FrontPoint]) -> str:
    """Plot perplexity ratio against weight bytes: the front, uniform choices, the chosen one.

    Where weights are integers, bytes read are a share of those of dense floats, so that
    quantisation alone and sparsity alone stand on the same axis; else bytes saved are.
    """
    from matplotlib.ticker import MaxNLocator, NullLocator

    in_integers = any(point.kind == "integers" for point in points)

    def place(point: FrontPoint) -> float:
        if in_integers and point.float_bytes is not None:
            return 100 * point.float_bytes
        return 100 * point.bytes_saved

    def draw(axes: Axes) -> None:
        kinds = {
            "floats": ("sparsity alone", _KINDS[4], "D", "--"),
            "integers": ("quantisation alone", _KINDS[3], "v", "-."),
            "front": ("both" if in_integers else "allocated", SPARSE, "o", "-"),
            "uniform": ("all linears alike", _KINDS[1], "s", ""),
            "chosen": ("chosen", _KINDS[2], "*", ""),
        }
        for kind, (words, colour, marker, line) in kinds.items():
            mine = sorted(
                (place(point), point.perplexity_ratio) for point in points if point.kind == kind
            )
            if not mine:
                continue
            axes.plot(
                [saved for saved, _ in mine],
                [ratio for _, ratio in mine],
                color=colour,
                marker=marker,
                markersize=12 if kind == "chosen" else 5,
                linestyle=line or "none",
                label=words,
            )
        axes.set_xlabel(
            "weight bytes read a decoded token, % of dense floats"
            if in_integers
            else "weight bytes saved a decoded token, %"
        )
        axes.set_ylabel("perplexity ratio to dense")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.figure.legend(loc="outside upper left", ncols=3)

    return svg_from(draw, title="Pareto front: perplexity ratio against weight bytes saved")


def read_share_svg(shares: Sequence[ReadShare]) -> str:
    """Plot the share of each site's weight bytes that a decoded token reads."""

    def draw(axes: Axes) -> None:
        plot_by_layer(axes, shares, lambda row: 100 * row.share)
        axes.set_ylabel("weight bytes read, %")
        axes.set_ylim(0, 104)

    title = "Share of weight bytes that a decoded token reads, by decoder layer"
    return svg_from(draw, title=title)
