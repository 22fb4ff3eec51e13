"""A KV cache in pages: what sequences share is stored once, and nothing moves when one grows.

    sequence a:  pages 0 1 4        a page holds 32 positions of all layers
    sequence b:  pages 0 1 2 3      0 and 1: the beginning that both have, stored once

A page is written behind its last position alone, and by whoever comes first; a sequence that goes
on inside a page that another went on from copies that page. So a cache, once returned, never
changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PAGE = 32
"""Positions of a page; as in `graph.shared_step`."""
_FIRST_PAGES = 64
_GROWTH = 1.5


class _Page:
    """One page of a pool's arrays; freed when the last sequence that holds it is dropped."""

    __slots__ = ("_free", "filled", "index")

    def __init__(self, index: int, free: list[int]) -> None:
        self.index = index
        self.filled = 0
        """Positions that somebody has written."""
        self._free = free

    def __del__(self) -> None:
        self._free.append(self.index)


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedSequence:
    """The first `length` tokens of a sequence, on pages of a pool; dropping it frees them."""

    pool: PagePool
    pages: tuple[_Page, ...]
    length: int

    @property
    def indices(self) -> list[int]:
        """Indices of its pages in the pool's arrays."""
        return [page.index for page in self.pages]


class PagePool:
    """Memory for pages; grows on demand."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Begin with a few pages; `shapes` are those of one page in each array of the cache."""
        self._shapes = tuple(shapes)
        self.arrays: tuple[NDArray[np.float32], ...] = ()
        """`[pages, *shape]` each; others after each growth."""
        self._free: list[int] = []
        self._size = 0
        self._grow(_FIRST_PAGES)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all arrays together."""
        return sum(4 * int(np.prod(shape)) for shape in self._shapes)

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self._size - len(self._free)

    def extend(self, before: PagedSequence | None, count: int) -> PagedSequence:
        """Return a sequence with room for `count` more tokens, not yet written.

        Args:
            before: What it goes on from; it stays as it is. One of another pool is copied.
            count: Tokens, at least 1.
        """
        start = 0 if before is None else before.length
        if before is not None and self._fits(before, count):
            before.pages[-1].filled += count
            return PagedSequence(pool=self, pages=before.pages, length=start + count)
        pages = [] if before is None else self._own(before)
        end = start + count
        while len(pages) * PAGE < end:
            pages.append(self._take())
        for index in range(start // PAGE, len(pages)):
            pages[index].filled = min(PAGE, end - index * PAGE)
        return PagedSequence(pool=self, pages=tuple(pages), length=end)

    def adopt(self, sequence: PagedSequence) -> PagedSequence:
        """Copy a sequence to this pool's pages, so that its last page can be extended."""
        pages = tuple(self._own(sequence))
        return PagedSequence(pool=self, pages=pages, length=sequence.length)

    def _fits(self, sequence: PagedSequence, count: int) -> bool:
        """Tell whether `count` tokens fit on the last page, which nobody else has extended."""
        used = sequence.length % PAGE
        is_open = sequence.pool is self and 0 < used == sequence.pages[-1].filled
        return is_open and used + count <= PAGE

    def _own(self, sequence: PagedSequence) -> list[_Page]:
        """Its pages; copies of those that are another pool's, or written further by others."""
        lengths = [
            min(PAGE, sequence.length - index * PAGE) for index in range(len(sequence.pages))
        ]
        return [
            page
            if sequence.pool is self and length in {PAGE, page.filled}
            else self._copy_of(sequence.pool, page, length)
            for page, length in zip(sequence.pages, lengths, strict=True)
        ]

    def _copy_of(self, pool: PagePool, page: _Page, length: int) -> _Page:
        copy = self._take()
        for mine, others in zip(self.arrays, pool.arrays, strict=True):
            mine[copy.index] = others[page.index]
        copy.filled = length
        return copy

    def _take(self) -> _Page:
        if not self._free:
            self._grow(int(self._size * _GROWTH))
        return _Page(self._free.pop(), self._free)

    def _grow(self, size: int) -> None:
        # Zeros, since a kernel reads whole pages: what nobody wrote must at least be finite. They
        # take memory once they are written.
        grown = [np.zeros((size, *shape), np.float32) for shape in self._shapes]
        old = list(self.arrays)
        self.arrays = ()
        for array in grown[::-1]:
            if old:
                array[: self._size] = old.pop()  # whose memory is free now
        self.arrays = tuple(grown)
        self._free += range(size - 1, self._size - 1, -1)
        self._size = size


def beginning(sequence: PagedSequence, length: int) -> PagedSequence:
    """Return the first tokens of a sequence, on the same pages."""
    pages = sequence.pages[: -(-length // PAGE)]
    return PagedSequence(pool=sequence.pool, pages=pages, length=length)
