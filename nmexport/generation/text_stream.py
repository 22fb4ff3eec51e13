"""Text of tokens as they come: whole characters, and never past a stop text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns one sequence's tokens into pieces of text, never half a character.

    A character may take several tokens, and a token's text may depend on the one before it (a
    leading space): so a window of tokens is decoded with and without the new ones, and the
    difference is returned once it ends in a whole character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` maps token ids to text, special tokens left out."""
        self._decode = decode
        self._window: list[int] = []
        self._given = 0
        """Tokens of the window whose text is out."""

    def push(self, token: int) -> str:
        """Add a token; return the text that it completes, empty inside a character."""
        self._window.append(token)
        before, now = self._decode(self._window[: self._given]), self._decode(self._window)
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return now[len(before) :]

    def flush(self) -> str:
        """Return what is left at the end: half a character, or a real replacement character."""
        before, now = self._decode(self._window[: self._given]), self._decode(self._window)
        self._given = len(self._window)
        return now[len(before) :]
