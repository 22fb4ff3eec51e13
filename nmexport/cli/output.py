"""stdout carries results, as a table for a person or as one JSON document; stderr the rest."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console
    from rich.table import Table

    from nmexport.progress import Progress

_JSON = "nmexport.json"
_VERBOSE = "nmexport.verbose"
_EMITTED = "nmexport.emitted"


def _remember(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        del parameter
        ctx.meta[name] = value
        if name == _VERBOSE:
            _set_up_logging(value)
        return value

    return callback


json_option = click.option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember(_JSON),
    help="Print one JSON document on stdout; on an error, {error, exit_code}.",
)
verbose_option = click.option(
    "-v",
    "--verbose",
    count=True,
    is_eager=True,
    expose_value=False,
    callback=_remember(_VERBOSE),
    help="Print more on stderr; repeat for everything.",
)


def wants_json(ctx: click.Context) -> bool:
    """Tell whether `--json` was given."""
    return bool(ctx.meta.get(_JSON))


def is_verbose(ctx: click.Context) -> bool:
    """Tell whether `-v` was given."""
    return bool(ctx.meta.get(_VERBOSE))


def has_emitted(ctx: click.Context) -> bool:
    """Tell whether the verb's JSON document was already written."""
    return bool(ctx.meta.get(_EMITTED))


def _set_up_logging(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.getLogger("nmexport").setLevel(level)
    logging.basicConfig(
        level=logging.WARNING if verbose < 2 else logging.INFO,  # noqa: PLR2004  -vv
        stream=sys.stderr,
        format="%(name)s: %(message)s",
        force=True,
    )


def emit_json(value: object) -> None:
    """Print one JSON document on stdout; a second one would not be JSON, and is a bug."""
    click.get_current_context().meta[_EMITTED] = True
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def console() -> Console:
    """Return a console on stdout; plain text where that is no terminal."""
    from rich.console import Console

    # A pipe has no width: wide enough that no figure is cut.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: Sequence[str] = (),
) -> Table:
    """Return a table; its first column and those named in `left` are text, the others figures."""
    from rich import box
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        grid.add_column(
            column, justify="left" if index == 0 or column in left else "right", overflow="fold"
        )
    for row in rows:
        grid.add_row(*[_plain_cell(cell) for cell in row])
    return grid


def _plain_cell(cell: object) -> str:
    from rich.markup import escape

    return "-" if cell is None else escape(str(cell))


def progress() -> Progress:
    """Return progress on stderr."""
    from nmexport.progress import on_stream

    return on_stream(sys.stderr)


def size(count: float | None) -> str:
    """Format bytes for a person, or a dash where nothing was measured."""
    from nmexport.progress import size as spelled

    return "-" if count is None else spelled(count)


def figure(value: float | None, digits: int = 2, suffix: str = "") -> str:
    """Format a measured number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}{suffix}"
