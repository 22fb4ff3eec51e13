"""Progress of long work, on stderr: a bar with ETA on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress as RichBars

T = TypeVar("T")

LINE_SECONDS = 5.0
"""How often a log that nobody watches live gets a line."""


class Progress(Protocol):
    """Receives a stage's progress."""

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, counting them under the label."""
        ...

    def note(self, message: str) -> None:
        """Show one line of information."""
        ...


class Silent:
    """Reports nothing."""

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items."""
        del label, total
        return iter(items)

    def note(self, message: str) -> None:
        """Drop the message."""


class Lines:
    """A line at most every few seconds, and one at the end: for logs and pipes."""

    def __init__(
        self,
        stream: TextIO,
        *,
        every: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write to the stream, at most one line of counting every few seconds."""
        self._stream = stream
        self._every = every
        self._clock = clock

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, with count, ETA and peak memory now and then."""
        size = total if total is not None else length_of(items)
        began = said = self._clock()
        count = 0
        try:
            for count, item in enumerate(items, start=1):
                yield item
                now = self._clock()
                if now - said >= self._every and count != size:
                    self.note(
                        f"{label}: {_format_count(count, size)}{_eta(now - began, count, size)}"
                    )
                    said = now
        finally:  # whoever stops early, because there is no more to do, has a last line too
            seconds = self._clock() - began
            early = size is not None and count < size
            if seconds >= 1 or early:  # what took no time is not worth a line
                counted = _format_count(count, size) + (", ended early," if early else "")
                self.note(f"{label}: {counted} in {duration(seconds)}, {_peak()}")

    def note(self, message: str) -> None:
        """Write the line."""
        self._stream.write(message + "\n")
        self._stream.flush()


class Bars:
    """A live bar with ETA and peak memory, for a person at a terminal."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on the stream, which must be a terminal."""
        from rich.console import Console

        self._console = Console(file=stream, stderr=stream is sys.stderr)
        self._bars: RichBars | None = None

    def track(self, items: Iterable[T], *, label: str, total: int | None = None) -> Iterator[T]:
        """Yield the items under a bar; a bar inside a bar stands below it."""
        size = total if total is not None else length_of(items)
        with self._show() as bars:
            task = bars.add_task(label, total=size, peak=_peak())
            try:
                for item in items:
                    yield item
                    bars.update(task, advance=1, peak=_peak())
            finally:
                bars.remove_task(task)

    def note(self, message: str) -> None:
        """Print the line above the bars."""
        self._console.print(message, highlight=False, markup=False)

    @contextmanager
    def _show(self) -> Iterator[RichBars]:
        """Start the one live display: rich allows no second one on a terminal."""
        if self._bars is not None:
            yield self._bars
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        with RichBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[peak]}"),
            console=self._console,
            transient=True,
        ) as bars:
            self._bars = bars
            try:
                yield bars
            finally:
                self._bars = None


def on_stream(stream: TextIO) -> Progress:
    """Choose bars on a terminal, lines elsewhere."""
    return Bars(stream) if stream.isatty() else Lines(stream)


@contextmanager
def busy(progress: Progress, label: str) -> Iterator[None]:
    """Show one long step that cannot be counted, and then how long it took."""
    step = iter(progress.track(range(1), label=label, total=1))
    next(step, None)
    yield
    next(step, None)  # past the end: a bar closes once it is asked for more


def length_of(items: object) -> int | None:
    """Return the number of items, or None where they cannot be counted beforehand."""
    length = getattr(items, "__len__", None)
    return int(length()) if length is not None else None


def peak_rss_bytes() -> int:
    """Return the peak memory of this process, ever or since `reset_peak_rss`.

    On Linux not `ru_maxrss`: a child inherits its parent's through fork and exec.
    """
    import resource

    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def reset_peak_rss() -> None:
    """Reset `peak_rss_bytes`, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 07 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004  seconds in a minute
        return f"{whole} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004  minutes in an hour
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Format bytes: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:  # noqa: PLR2004  SI steps
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _peak() -> str:
    return f"peak {size(peak_rss_bytes())}"


def _format_count(count: int, size: int | None) -> str:
    return f"{count}/{size}" if size is not None else str(count)


def _eta(elapsed: float, count: int, size: int | None) -> str:
    if size is None:
        return f", {_peak()}"
    remaining = elapsed / count * max(0, size - count)
    return f", about {duration(remaining)} left, {_peak()}"
