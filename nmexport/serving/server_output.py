"""Passes on what a server prints, and keeps its last lines for an error message."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import IO

_KEPT_LINES = 12
_JOIN_SECONDS = 2.0


class ServerOutput:
    """Passes lines on until the server and its children have closed their end."""

    def __init__(self, source: IO[bytes], target: int) -> None:
        """Start to pass lines on.

        Args:
            source: The pipe that the server writes to.
            target: File descriptor that takes the lines; a copy of it is used.
        """
        self._source = source
        self._target = os.dup(target)
        self._last: deque[bytes] = deque(maxlen=_KEPT_LINES)
        self._thread = threading.Thread(target=self._pass_on, name="server-output", daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        with self._source, open(self._target, "wb", buffering=0) as target:  # noqa: PTH123
            for line in self._source:
                self._last.append(line)
                # Whoever read them may be gone: the server must not wait for that.
                with contextlib.suppress(OSError):
                    target.write(line)

    def last_lines(self) -> str:
        """Return the last lines so far, indented."""
        lines = [line.decode(errors="replace").rstrip() for line in tuple(self._last)]
        return "\n".join(f"  {line}" for line in lines) or "  it printed nothing"

    def finish(self) -> None:
        """Pass on the rest, once the server has ended."""
        self._thread.join(_JOIN_SECONDS)
