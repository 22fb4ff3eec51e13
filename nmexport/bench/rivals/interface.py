"""The interface of a contestant in `bench rivals`: one step of a case, ready to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.runtimes.session import Closing

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.report.model import PhaseName


@dataclass(frozen=True, kw_only=True)
class Case:
    """A decode step or a prompt that all contestants run."""

    phase: PhaseName
    batch: int
    """Sequences."""
    tokens: int
    """Tokens in the cache of a decode step, or of the prompt."""

    def __str__(self) -> str:
        """Name it for a person."""
        if self.phase == "prefill":
            return f"prompt of {self.tokens}"
        return f"decode, batch {self.batch}, context {self.tokens}"


class Step(ABC):
    """A decode step or a prompt that can be run again and again from the same state."""

    @abstractmethod
    def run(self) -> None:
        """Run once, until the next tokens are on the host."""

    def device_ms(self, times: int) -> float | None:
        """Milliseconds of a run where `times` of them are queued without waiting in between.

        The host prepares the next while the device computes: what is left is the device's time.
        None where that cannot be measured.
        """
        del times
        return None


class Contestant(Closing):
    """One model on one runtime, with its weights in memory."""

    @abstractmethod
    def prepare(self, case: Case) -> Step | None:
        """Make a step ready, compiled and warm; None where this contestant has no such case."""

    def release(self) -> None:
        """Free what the last case needed beyond the weights."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant before it is opened."""

    name: str
    is_rival: bool
    is_dense: bool
    """It computes every channel with weights of 16 bits or more: what sparsity is held against."""
    weight_bytes: int
    """Device memory that its weights take."""
    open: Callable[[], Contestant]
