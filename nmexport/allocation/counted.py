"""A choice that is held to its budget as built: choose, build, measure, and choose again."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from nmexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.allocation.choice import Allocation

Made = TypeVar("Made")

ATTEMPTS = 3
# What is built within this share of its budget is as good as what is built right on it.
_NEAR = 0.9
# Learning wins back more than nine tenths of a divergence only by the luck of few windows.
_MOST_RELIEF = 10.0


def built_within(
    choose: Callable[[float], Allocation],
    build: Callable[[Allocation, int], tuple[Made, Allocation]],
    *,
    counts_learned: bool,
) -> tuple[Made, Allocation]:
    """Build what keeps the budget, the fastest of several.

    The first choice keeps the budget before anything is learned. Where learning counts, the next
    may take as much more of it as learning won back from the one before.

    Args:
        choose: Makes a choice, given what limits of accuracy are multiplied by.
        build: Builds a choice, given how many were built before; returns it with what it came to.
        counts_learned: Whether to choose again.

    Raises:
        RecipeError: if no choice keeps the budget even before it is built.
    """
    made, best = build(choose(1.0), 0)
    last = best
    for attempt in range(1, ATTEMPTS if counts_learned else 1):
        relief = _relief(last)
        chosen = None if relief is None else _chosen(choose, relief)
        if chosen is None or chosen.choices in (best.choices, last.choices):
            break
        again, last = build(chosen, attempt)
        if _is_better(last, best):
            made, best = again, last
    return made, best


def _relief(built: Allocation) -> float | None:
    """How much of the budget a choice may take before it is built; None where this one is good."""
    before, after = built.budget_used, None if built.built is None else built.built.budget_used
    if before is None or after is None or _NEAR <= after <= 1:
        return None
    return min(before / max(after, before / _MOST_RELIEF), _MOST_RELIEF)


def _chosen(choose: Callable[[float], Allocation], relief: float) -> Allocation | None:
    try:
        return choose(relief)
    except RecipeError:
        return None  # so little is left of the budget that only the dense model keeps it


def _is_better(one: Allocation, other: Allocation) -> bool:
    """Kept before broken; of those that keep it the faster, of the others the more accurate."""
    if _used(one) <= 1 and _used(other) <= 1:
        return one.decode_speedup > other.decode_speedup
    return _used(one) < _used(other)


def _used(one: Allocation) -> float:
    used = None if one.built is None else one.built.budget_used
    return 0.0 if used is None else used
