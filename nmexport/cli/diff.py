"""`nmexport diff`."""

from __future__ import annotations

import click


@click.command("diff")
def diff_command() -> None:
    """To come."""
