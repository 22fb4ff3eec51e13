"""Writes text of other kinds than an encyclopedia's: what a calibrated model is to be held against.

    python plugins/bench/other_text.py other.txt

Sections of Python's reference manual, source code of its standard library, and this repository's
licence, in turn: there wherever Python is, the same for one version of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.calibration.python_text import in_turn, manual, pieces, source

if TYPE_CHECKING:
    from collections.abc import Iterator

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"


def licence() -> Iterator[str]:
    """Text of a lawyer's."""
    yield from pieces(LICENCE.read_text(encoding="utf-8"))


def main() -> int:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--pieces", type=int, default=60)
    options = parser.parse_args()
    written = in_turn((manual(), source(), licence()), options.pieces)
    options.file.write_text("".join(written), encoding="utf-8")
    sys.stdout.write(
        f"{options.file}: {len(written)} pieces, {sum(map(len, written))} characters\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
