"""`nmexport` and `python -m nmexport`."""

from __future__ import annotations

from nmexport.cli.main import cli


def main() -> None:
    """Run the command line; leaves by SystemExit with the exit code."""
    cli(prog_name="nmexport")


if __name__ == "__main__":
    main()
