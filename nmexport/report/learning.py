"""The report's part on calibration: how learning went, and how close groups came to no groups."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from nmexport.report.model import Calibration, GroupingGain, LearnedConstants
from nmexport.report.plots import DENSE, SPARSE, plot_by_layer, svg_from
from nmexport.store.records import record_from

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from nmexport.store.layers import LayerSpec

_SMOOTH = 20  # steps: a batch is few chunks, and its loss jumps


def section(learning: Mapping[str, Any] | None, layers: Sequence[LayerSpec]) -> Calibration:
    """Describe a calibration.

    Args:
        learning: Settings and loss curve of the learned constants, as `fold` wrote them; None
            without any.
        layers: The sparsified linears.
    """
    return Calibration(
        learning=None
        if learning is None
        else record_from(LearnedConstants, learning, lenient=True),
        grouping=tuple(
            GroupingGain(name=layer.name, gap_closed=layer.gap_closed)
            for layer in layers
            if layer.gap_closed is not None
        ),
    )


def words(calibration: Calibration) -> dict[str, str | None]:
    """Say each part in a sentence; None where there is nothing to say."""
    return {
        "learning": _learning_words(calibration.learning),
        "grouping": _grouping_words(calibration.grouping),
    }


def plots(calibration: Calibration) -> dict[str, str]:
    """Draw `loss` and `grouping`, where there is something to draw."""
    drawn = {}
    if calibration.learning is not None:
        drawn["loss"] = _loss_svg(calibration.learning)
    if calibration.grouping:
        drawn["grouping"] = _grouping_svg(calibration.grouping)
    return drawn


def _learning_words(learning: LearnedConstants | None) -> str | None:
    if learning is None:
        return None
    settings, curve = learning.settings, learning.curve
    if curve.block_steps:
        steps = f"Constants learned block by block, each in {curve.block_steps} steps"
    else:
        steps = f"Constants learned in {len(curve.learned)} steps"
    steps += f" of {settings.batch} x {settings.length} tokens"
    if not curve.held_out:
        return f"{steps}."
    (_, first), (_, last) = curve.held_out[0], curve.held_out[-1]
    return (
        f"{steps}: on held-out calibration text the divergence fell from {first:.3f} to {last:.3f}."
    )


def _grouping_words(grouping: Sequence[GroupingGain]) -> str | None:
    if not grouping:
        return None
    worst = min(grouping, key=lambda gain: gain.gap_closed)
    return (
        f"Channel orders close {median(gain.gap_closed for gain in grouping):.0%} (median; least "
        f"{worst.gap_closed:.0%}, {worst.name}) of the distance from consecutive groups to "
        "selecting as many channels without groups."
    )


def _loss_svg(learning: LearnedConstants) -> str:
    curve = learning.curve
    learned = curve.learned
    disturbed = learning.settings.disturbance > 0.0
    window = max(1, min(_SMOOTH, len(learned) // 5))
    smooth = [
        sum(learned[max(0, end - window) : end]) / (end - max(0, end - window))
        for end in range(1, len(learned) + 1)
    ]

    def draw(axes: Axes) -> None:
        said = "learned from, scores disturbed" if disturbed else "learned from"
        if smooth:
            axes.plot(range(1, len(smooth) + 1), smooth, color=DENSE, linewidth=1.2, label=said)
        if curve.held_out:
            steps, losses = zip(*curve.held_out, strict=True)
            axes.plot(steps, losses, "o-", color=SPARSE, markersize=4, label="held out")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step of each block" if curve.block_steps else "step")
        axes.set_ylabel("KL to the dense model, nats a token")
        axes.legend()

    return svg_from(draw, title="Loss of the learned constants by step")


def _grouping_svg(grouping: Sequence[GroupingGain]) -> str:
    def draw(axes: Axes) -> None:
        plot_by_layer(axes, grouping, lambda gain: 100 * gain.gap_closed)
        axes.axhline(0, color=DENSE, linewidth=0.8)
        axes.set_ylabel("distance to unstructured closed, %")

    return svg_from(draw, title="Distance to unstructured selection closed, by decoder layer")
