"""Writes text of other kinds than an encyclopedia's: what a calibrated model is to be held against.

    python plugins/bench/other_text.py other.txt

Sections of Python's reference manual, source code of its standard library, and this repository's
licence, in turn: there wherever Python is, the same for one version of it.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json.decoder
import statistics
import string
import sys
import textwrap
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
MODULES = (textwrap, json.decoder, statistics, string, inspect)
PIECE_CHARACTERS = 2400  # some 600 tokens


def pieces(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Paragraphs put together until a piece has `size` characters."""
    found: list[str] = []
    open_piece = ""
    for paragraph in text.strip("\n").split("\n\n"):
        open_piece += paragraph + "\n\n"
        if len(open_piece) >= size:
            found.append(open_piece)
            open_piece = ""
    return [*found, open_piece] if open_piece else found


def manual() -> Iterator[str]:
    """The reference manual, its longest sections first: short ones are mostly cross-references."""
    sections = sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0]))
    for _, text in sections:
        yield from pieces(text)


def source() -> Iterator[str]:
    """Source code of a few modules."""
    for module in MODULES:
        yield from pieces(inspect.getsource(module))


def licence() -> Iterator[str]:
    """Text of a lawyer's."""
    yield from pieces(LICENCE.read_text(encoding="utf-8"))


def in_turn(kinds: Sequence[Iterator[str]], count: int) -> list[str]:
    """The first `count` pieces, one of each kind in turn while it lasts."""
    rounds = itertools.zip_longest(*kinds)
    return list(itertools.islice((one for turn in rounds for one in turn if one), count))


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
