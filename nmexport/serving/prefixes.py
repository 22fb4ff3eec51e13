"""A prefix cache: beginnings that requests share are computed once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

_LEAST = 16
"""Tokens that are worth it."""


class Prefixes:
    """Caches of computed texts, the most recently used last."""

    def __init__(self, session: Session, most_bytes: int) -> None:
        """Keep caches of a session.

        Args:
            session: One that can give the beginning of a cache; with others nothing is kept.
            most_bytes: Bytes of all of them together. What they share is counted for each.
        """
        self._session = session
        self._most = most_bytes
        self._held: OrderedDict[bytes, tuple[NDArray[np.int64], Any]] = OrderedDict()
        self.bytes = 0

    def find(self, prompt: NDArray[np.int64]) -> tuple[int, Any | None]:
        """Find the longest cached beginning of a prompt `[S]`.

        Returns:
            Its length, and its cache; 0 and None where it is not worth it. The last token is never
            among them: somebody has to compute its logits.
        """
        best, key = 0, b""
        for name, (text, _) in self._held.items():
            common = _common(text, prompt[:-1])
            if common > best:
                best, key = common, name
        if best < _LEAST:
            return 0, None
        cache = self._session.beginning(self._held[key][1], best)
        if cache is None:
            return 0, None
        self._held.move_to_end(key)
        return best, cache

    def keep(self, text: NDArray[np.int64], cache: Any) -> None:
        """Keep the cache of a text `[S]`; it replaces those of its own beginnings."""
        if len(text) < _LEAST or self._session.beginning(cache, 1) is None:
            return
        for name, (other, _) in list(self._held.items()):
            common = _common(other, text)
            if common == len(text):
                self._held.move_to_end(name)
                return
            if common == len(other):
                self._drop(name)
        self._held[text.tobytes()] = (text, cache)
        self.bytes += self._session.cache_bytes(len(text))
        self.shrink(self._most)

    def shrink(self, most_bytes: int) -> None:
        """Drop the least recently used until the others fit."""
        while self._held and self.bytes > most_bytes:
            self._drop(next(iter(self._held)))

    def _drop(self, name: bytes) -> None:
        text, _ = self._held.pop(name)
        self.bytes -= self._session.cache_bytes(len(text))


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Count the tokens that two texts begin with alike."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if differing.size else length
