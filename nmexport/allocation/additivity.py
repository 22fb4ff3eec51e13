"""From the sum of what sites cost alone to what they cost together, through measured points.

Errors of many sites neither simply add nor grow in one way for all models: so the joint model is
run at a few points of the front, and what lies between them is read off a line in logarithms.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, field

_LEAST = 1e-9  # nats: a divergence of nothing still has a logarithm


@dataclass
class Additivity:
    """A rising curve through points (sum of single costs, cost of all together)."""

    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, summed: float, joint: float) -> None:
        """One more measured point."""
        self.points.append((max(summed, _LEAST), max(joint, _LEAST)))

    def joint(self, summed: float) -> float:
        """What a sum comes to."""
        return _interpolated(self._curve(), max(summed, _LEAST))

    def summed(self, joint: float) -> float:
        """The sum that comes to this."""
        return _interpolated([(y, x) for x, y in self._curve()], max(joint, _LEAST))

    def factor(self) -> float | None:
        """Joint over sum, geometric mean of all points; None without any."""
        if not self.points:
            return None
        logs = [math.log(joint / summed) for summed, joint in self.points]
        return math.exp(math.fsum(logs) / len(logs))

    def _curve(self) -> list[tuple[float, float]]:
        """The points in order, both coordinates rising: what noise turns round is levelled."""
        ordered = sorted(self.points)
        highest = itertools.accumulate((y for _, y in ordered), max)
        curve: list[tuple[float, float]] = []
        for (x, _), y in zip(ordered, highest, strict=True):
            if not curve or (x > curve[-1][0] and y > curve[-1][1]):
                curve.append((x, y))
        return curve


def _interpolated(curve: list[tuple[float, float]], x: float) -> float:
    """Linear in logarithms; outside of the points in proportion to the nearest."""
    place = bisect.bisect_left(curve, x, key=lambda point: point[0])
    if place in {0, len(curve)}:
        x0, y0 = curve[min(place, len(curve) - 1)]
        return y0 * x / x0
    (x0, y0), (x1, y1) = curve[place - 1], curve[place]
    share = math.log(x / x0) / math.log(x1 / x0)
    return y0 * float((y1 / y0) ** share)
