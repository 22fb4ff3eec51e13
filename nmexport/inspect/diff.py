"""Compares two descriptions of one kind."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, TypedDict

from nmexport.errors import UserError
from nmexport.inspect.describe import describe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# About the making, not about what was made.
_LEFT_OUT = frozenset({"path", "made", "seconds", "share", "peak_memory_bytes"})

_FEW = 40
"""Rows that a screen takes."""
_FIGURES = tuple(
    f"report.{name}"
    for name in (
        "verdict",
        "accuracy.perplexity_ratio",
        "accuracy.dense.perplexity",
        "accuracy.sparse.perplexity",
        "accuracy.kl_mean",
        "accuracy.top1_agreement",
        "latency.speedup.decode",
        "latency.speedup.prefill",
        "sparsity.achieved",
        "memory.artifact_bytes",
        "memory.peak_rss_bytes",
    )
)
_CHOSEN = ("recipe.", "inputs.", "metrics.", "bytes", "stages[")
"""Values that were asked for, and the few numbers that sum up the result."""


class Difference(TypedDict):
    """One value that differs."""

    what: str
    """Its keys, joined by dots."""
    before: object
    after: object
    ratio: float | None
    """After over before, of two numbers."""


class Comparison(TypedDict):
    """The changes from one path to another."""

    kind: str
    before: str
    after: str
    same: bool
    differences: list[Difference]


def compare(before: Path, after: Path) -> Comparison:
    """List what changed from one path to the other.

    Raises:
        UserError: if they are of two kinds, or one cannot be described.
    """
    old, new = describe(before), describe(after)
    if old["kind"] != new["kind"]:
        raise UserError(
            f"Two kinds of things: {before} ({old['kind']}) and {after} ({new['kind']}).",
            allowed="two paths of one kind",
        )
    differences = differences_of(_flat(old), _flat(new))
    return {
        "kind": str(old["kind"]),
        "before": str(before),
        "after": str(after),
        "same": not differences,
        "differences": differences,
    }


def summary(
    differences: Sequence[Difference],
) -> tuple[list[Difference], dict[str, int]]:
    """Return the most important differences, and how many others there are.

    Returns:
        Rows to show, key figures first; and the number of the others by section.
    """
    if len(differences) <= _FEW:
        return list(differences), {}
    by_name = {row["what"]: row for row in differences}
    figures = [by_name[name] for name in _FIGURES if name in by_name]
    chosen = [row for row in differences if row["what"].startswith(_CHOSEN)]
    shown = [*figures, *chosen][:_FEW]
    names = {row["what"] for row in shown}
    others = Counter(_section(row["what"]) for row in differences if row["what"] not in names)
    return shown, dict(others.most_common())


def _section(what: str) -> str:
    """The first two parts of a dotted name, without what tells one row of a table from another."""
    return ".".join(re.sub(r"\[.*", "", what).split(".")[:2])


def differences_of(before: dict[str, object], after: dict[str, object]) -> list[Difference]:
    """List the differences between two flat descriptions."""
    rows: list[Difference] = []
    for what in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(what), after.get(what)
        if old != new:
            rows.append({"what": what, "before": old, "after": new, "ratio": _ratio(old, new)})
    return rows


def _flat(value: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Join nested keys by dots; name a row by its first value."""
    flat: dict[str, object] = {}
    for name, item in value.items():
        if name in _LEFT_OUT:
            continue
        where = f"{prefix}{name}"
        if isinstance(item, dict):
            flat.update(_flat(item, f"{where}."))
        elif isinstance(item, list) and item and all(isinstance(row, dict) for row in item):
            for row in item:
                first, *rest = row.items()
                flat.update(_flat(dict(rest), f"{where}[{first[1]}]."))
        else:
            flat[where] = item
    return flat


def _ratio(before: object, after: object) -> float | None:
    """Divide after by before, where both are numbers and that says something."""
    for value in (before, after):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
    if not isinstance(before, int | float) or not isinstance(after, int | float) or before == 0:
        return None
    return after / before
