"""The report's part on calibration: how learning went, and how close groups came to no groups."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from nmexport.report.plots import DENSE, SPARSE, _by_layer, svg_from

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

_SMOOTH = 20  # steps: a batch is few chunks, and its loss jumps


def section(
    learning: Mapping[str, Any] | None, layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The report's `calibration`.

    Args:
        learning: Settings and loss curve of the learned constants; None without any.
        layers: The sparsified linears, `name` and `gap_closed` each.

    Returns:
        `learning`, and `grouping`: `[{name, gap_closed}]` of the linears whose channel order was
        calibrated.
    """
    grouping = [
        {"name": layer["name"], "gap_closed": layer["gap_closed"]}
        for layer in layers
        if layer["gap_closed"] is not None
    ]
    return {"learning": None if learning is None else dict(learning), "grouping": grouping}


def words(calibration: Mapping[str, Any]) -> dict[str, str | None]:
    """Each part in a sentence; None where there is nothing to say."""
    return {
        "learning": _learning_words(calibration["learning"]),
        "grouping": _grouping_words(calibration["grouping"]),
    }


def plots(calibration: Mapping[str, Any]) -> dict[str, str]:
    """`loss` and `grouping`, where there is something to draw."""
    drawn = {}
    if calibration["learning"] is not None:
        drawn["loss"] = _loss_svg(calibration["learning"])
    if calibration["grouping"]:
        drawn["grouping"] = _grouping_svg(calibration["grouping"])
    return drawn


def _learning_words(learning: Mapping[str, Any] | None) -> str | None:
    if learning is None:
        return None
    settings, curve = learning["settings"], learning["curve"]
    said = (
        f"Constants learned in {len(curve['learned'])} steps of {settings['batch']} x "
        f"{settings['length']} tokens"
    )
    if not curve["held_out"]:
        return f"{said}."
    (_, first), *_, (_, last) = curve["held_out"]
    return (
        f"{said}: on held-out calibration text the divergence fell from {first:.3f} to {last:.3f}."
    )


def _grouping_words(grouping: Sequence[Mapping[str, Any]]) -> str | None:
    if not grouping:
        return None
    closed = [row["gap_closed"] for row in grouping]
    worst = min(grouping, key=lambda row: row["gap_closed"])
    return (
        f"Channel orders close {median(closed):.0%} (median; least {worst['gap_closed']:.0%}, "
        f"{worst['name']}) of the distance from consecutive groups to selecting as many channels "
        "without groups."
    )


def _loss_svg(learning: Mapping[str, Any]) -> str:
    curve = learning["curve"]
    learned = curve["learned"]
    disturbed = learning["settings"].get("disturbance", 0.0) > 0.0
    window = max(1, min(_SMOOTH, len(learned) // 5))
    smooth = [
        sum(learned[max(0, end - window) : end]) / (end - max(0, end - window))
        for end in range(1, len(learned) + 1)
    ]

    def draw(axes: Axes) -> None:
        said = "learned from, scores disturbed" if disturbed else "learned from"
        axes.plot(range(1, len(smooth) + 1), smooth, color=DENSE, linewidth=1.2, label=said)
        if curve["held_out"]:
            steps, losses = zip(*curve["held_out"], strict=True)
            axes.plot(steps, losses, "o-", color=SPARSE, markersize=4, label="held out")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("KL to the dense model, nats a token")
        axes.legend()

    return svg_from(draw, title="Loss of the learned constants by step")


def _grouping_svg(grouping: Sequence[dict[str, Any]]) -> str:
    def draw(axes: Axes) -> None:
        _by_layer(axes, grouping, lambda row: 100 * row["gap_closed"])
        axes.axhline(0, color=DENSE, linewidth=0.8)
        axes.set_ylabel("distance to unstructured closed, %")

    return svg_from(draw, title="Distance to unstructured selection closed, by decoder layer")
