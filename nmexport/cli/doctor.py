"""`nmexport doctor`."""

from __future__ import annotations

import click


@click.command("doctor")
def doctor_command() -> None:
    """To come."""
