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
    difference is given out once it ends in a whole character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` maps token ids to text, special tokens left out."""
        self._decode = decode
        self._window: list[int] = []
        self._given = 0
        """Tokens of the window whose text is out."""

    def push(self, token: int) -> str:
        """The text that one more token completes; empty inside a character."""
        self._window.append(token)
        before, now = self._decode(self._window[: self._given]), self._decode(self._window)
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return now[len(before) :]

    def flush(self) -> str:
        """What is left at the end: half a character, or really a replacement character."""
        before, now = self._decode(self._window[: self._given]), self._decode(self._window)
        self._given = len(self._window)
        return now[len(before) :]


class StopFilter:
    """Passes text up to the first of the stop texts; holds back what might begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Empty stop texts stop nothing."""
        self._stops = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """Whether a stop text was met; nothing passes any more."""

    def push(self, piece: str) -> str:
        """The text that is now certain."""
        if self.stopped:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(text) for text in self._stops) if at >= 0]
        if found:
            self.stopped = True
            safe = min(found)
        else:
            safe = len(self._held) - max(
                (_overlap(self._held, text) for text in self._stops), default=0
            )
        given, self._held = self._held[:safe], self._held[safe:]
        return given

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        given, self._held = ("" if self.stopped else self._held), ""
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
