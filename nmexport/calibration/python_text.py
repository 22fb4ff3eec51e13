"""Text that comes with Python: its reference manual and source code of its standard library.

There wherever Python is, the same for one version of it: real text for a machine that reaches no
hub, of two kinds that a language model has seen little of.
"""

from __future__ import annotations

import inspect
import itertools
import json.decoder
import statistics
import string
import textwrap
from pydoc_data import topics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODULES = (textwrap, json.decoder, statistics, string, inspect)
PIECE_CHARACTERS = 2400  # some 600 tokens
PIECES = 96
"""Pieces of the corpus `python`: some 60,000 tokens."""


def python_text() -> str:
    """Return the corpus `python`: pieces of the manual and of source code in turn."""
    return "".join(in_turn((manual(), source()), PIECES))


def pieces(text: str, size: int = PIECE_CHARACTERS) -> list[str]:
    """Put paragraphs together until a piece has `size` characters."""
    finished: list[str] = []
    open_piece = ""
    for paragraph in text.strip("\n").split("\n\n"):
        open_piece += paragraph + "\n\n"
        if len(open_piece) >= size:
            finished.append(open_piece)
            open_piece = ""
    return [*finished, open_piece] if open_piece else finished


def manual() -> Iterator[str]:
    """Yield the reference manual, longest sections first: short ones are mostly references."""
    sections = sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0]))
    for _, text in sections:
        yield from pieces(text)


def source() -> Iterator[str]:
    """Yield the source code of a few modules."""
    for module in MODULES:
        yield from pieces(inspect.getsource(module))


def in_turn(kinds: Sequence[Iterator[str]], count: int) -> list[str]:
    """Take the first `count` pieces, one of each kind in turn while it lasts."""
    rounds = itertools.zip_longest(*kinds)
    return list(itertools.islice((piece for turn in rounds for piece in turn if piece), count))
