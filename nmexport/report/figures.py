"""Figures as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

ABSENT = "not measured"


def number(value: float | None, digits: int = 4) -> str:
    """Format a figure with some significant digits, without powers of ten."""
    if value is None:
        return ABSENT
    if value and abs(value) < 10**-digits:
        return f"{value:.2e}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded == int(rounded) and abs(rounded) >= 1 else f"{rounded:,}"


def count(value: int) -> str:
    """Format a count: in full, or in millions and billions."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:,}"


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share, in percent."""
    return ABSENT if value is None else f"{100 * value:.{digits}f} %"


def size(value: int | None) -> str:
    """Format bytes in a readable unit."""
    return ABSENT if value is None else progress.size(value)


def speedup(value: float | None) -> str:
    """`1.52x`."""
    return ABSENT if value is None else f"{value:.2f}x"


def times(value: float | None) -> str:
    """`1.6x`."""
    return ABSENT if value is None else f"{number(value, 3)}x"


def interval(ends: Sequence[float] | None) -> str:
    """` (1.41x to 1.53x)`; nothing where it was not measured."""
    return "" if ends is None else f" ({speedup(ends[0])} to {speedup(ends[1])})"


def milliseconds(value: float | None) -> str:
    """`7.12 ms`."""
    return ABSENT if value is None else f"{number(value, 3)} ms"


def rate(value: float | None) -> str:
    """`140 tokens/s`; nothing where it was not measured: the time says so."""
    return "" if value is None else f"{number(value, 3)} tokens/s"
