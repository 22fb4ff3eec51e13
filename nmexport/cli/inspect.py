"""`nmexport inspect`."""

from __future__ import annotations

import click


@click.command("inspect")
def inspect_command() -> None:
    """To come."""
