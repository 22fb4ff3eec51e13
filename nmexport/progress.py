"""Progress of long work, on stderr: a bar with ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


class Progress(Protocol):
    """What a stage reports to; the stage neither knows nor cares whether anybody looks."""

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, counting them under the label."""
        ...

    def note(self, message: str) -> None:
        """One line of information."""
        ...


class Silent:
    """Reports nothing."""

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items."""
        del label, total
        return iter(items)

    def note(self, message: str) -> None:
        """Drop the message."""
