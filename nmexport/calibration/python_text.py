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


def in_turn(kinds: Sequence[Iterator[str]], count: int) -> list[str]:
    """The first `count` pieces, one of each kind in turn while it lasts."""
    rounds = itertools.zip_longest(*kinds)
    return list(itertools.islice((one for turn in rounds for one in turn if one), count))
