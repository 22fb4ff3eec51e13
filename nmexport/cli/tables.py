"""Shows nested JSON values as tables, whatever their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.cli.output import size, table

if TYPE_CHECKING:
    from rich.console import Console

_DIGITS = 4


def show_value(out: Console, value: dict[str, object], title: str | None = None) -> None:
    """Print plain values as one table, and every list of rows as a table of its own."""
    plain = [(name, _cell(name, item)) for name, item in _flat(value) if not _is_rows(item)]
    if plain:
        out.print(table(title, ("", "value"), plain, left=("value",)))
    for name, item in _flat(value):
        if _is_rows(item):
            columns = list(dict.fromkeys(key for row in item for key in row))
            rows = [[_cell(column, row.get(column)) for column in columns] for row in item]
            out.print(table(name, columns, rows))


def _flat(value: dict[str, object], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested keys, joined by dots."""
    pairs: list[tuple[str, Any]] = []
    for name, item in value.items():
        if isinstance(item, dict):
            pairs += _flat(item, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", item))
    return pairs


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _cell(name: str, value: object) -> str:
    """Format a value on one line; bytes in a readable unit."""
    if value is None:
        return "-"
    if name.endswith("bytes") and isinstance(value, int):
        return size(value)
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    if isinstance(value, list):
        return ", ".join(_cell("", item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(key, item)}" for key, item in value.items())
    return str(value)
