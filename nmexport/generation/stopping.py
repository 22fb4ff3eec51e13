"""Stop texts: output ends at the first of them, and never shows the start of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopFilter:
    """Passes text up to the first of the stop texts; holds back what might begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Empty stop texts stop nothing."""
        self._stops = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """True once a stop text was met; nothing passes any more."""

    def push(self, piece: str) -> str:
        """Add text; return what is now certain."""
        if self.stopped:
            return ""
        self._held += piece
        starts = [at for at in (self._held.find(text) for text in self._stops) if at >= 0]
        if starts:
            self.stopped = True
            safe = min(starts)
        else:
            safe = len(self._held) - max(
                (_overlap(self._held, text) for text in self._stops), default=0
            )
        given, self._held = self._held[:safe], self._held[safe:]
        return given

    def flush(self) -> str:
        """Return the text that was held back, at the end of the text."""
        given, self._held = ("" if self.stopped else self._held), ""
        return given


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
