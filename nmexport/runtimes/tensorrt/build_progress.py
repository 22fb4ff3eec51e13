"""Measures a TensorRT build's progress, in hundredths, from its nested phases."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PERCENT = 100


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Meter:
    """Calls `tick` once for every hundredth part of the outermost phase that is done.

    A phase that runs inside another counts as a part of that one's current step. TensorRT calls
    from several threads.
    """

    def __init__(self, tick: Callable[[int], None]) -> None:
        """Call `tick` with every hundredth that is reached."""
        self._tick = tick
        self._phases: dict[str, _Phase] = {}
        self._told = 0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase of `steps` steps."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str) -> None:
        """Count one more step of a phase."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done += 1
            self._tell()

    def finish(self, name: str) -> None:
        """End a phase; its parent counts the step that it was part of."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._tell_up_to(PERCENT)

    def _tell(self) -> None:
        outermost = [name for name, phase in self._phases.items() if phase.parent is None]
        share = max((self._share(name) for name in outermost), default=0.0)
        self._tell_up_to(int(share * PERCENT))

    def _share(self, name: str) -> float:
        """Return the share of a phase that is done."""
        phase = self._phases[name]
        inside = [
            child
            for child, phase_of_child in self._phases.items()
            if phase_of_child.parent == name != child
        ]
        part = max((self._share(child) for child in inside), default=0.0)
        return min(1.0, (phase.done + part) / phase.steps)

    def _tell_up_to(self, percent: int) -> None:
        for reached in range(self._told + 1, percent + 1):
            self._tick(reached)
        self._told = max(self._told, percent)
