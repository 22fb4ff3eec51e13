"""Slots of a session: who has one, how far it is, and how many tokens fit into each."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nmexport.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    from nmexport.runtimes.cuda_model import CudaModel

SLOTS = 8
CHUNK = 256
_MEMORY_SHARE = 0.5
"""Share of the device's free memory that caches get; prompts need some of the rest."""
_UNIT = 128
"""Tokens that a slot's size is a multiple of where memory decides it."""


@dataclass(frozen=True, kw_only=True)
class SlotRoom:
    """Slots that a server wants."""

    slots: int = SLOTS
    """Sequences at a time: every decode step has as many rows, however few are in use."""
    tokens: int
    """Tokens of a sequence, prompt and answer together."""
    may_shrink: bool = False
    """Take fewer tokens where memory is short; False is an error then."""
    chunk: int = CHUNK
    """Prompts are cut at multiples of so many tokens."""
    cache_bytes: int | None = None
    """The most that all slots together may take; None is half of the device's free memory."""


@dataclass(eq=False)
class SlotLease:
    """Holds a slot until the last cache in it is dropped."""

    index: int


class Slots:
    """Which slots are free, and how many tokens are in the others."""

    def __init__(self, count: int) -> None:
        """Begin with all of them free."""
        self.count = count
        self.ends = np.zeros(count, np.int32)
        """Tokens of the sequence in each slot; 0 where there is none."""
        self._free = list(range(count - 1, -1, -1))

    def take(self) -> SlotLease:
        """Lend a slot until the lease is dropped.

        Raises:
            ArtifactError: if none is free.
        """
        if not self._free:
            raise ArtifactError(
                f"All {self.count} slots are taken.", allowed=f"{self.count} sequences at a time"
            )
        lease = SlotLease(self._free.pop())
        weakref.finalize(lease, self._give_back, lease.index)
        return lease

    def _give_back(self, index: int) -> None:
        self.ends[index] = 0
        self._free.append(index)


def slots_for(room: SlotRoom, model: CudaModel) -> int:
    """Tokens that each slot gets.

    Raises:
        RequestError: if memory has room for fewer than are wanted.
    """
    wanted = min(room.tokens, model.positions)
    free = model.free_bytes()
    most = int(free * _MEMORY_SHARE) if room.cache_bytes is None else room.cache_bytes
    each = room.slots * model.bytes_per_token
    fitting = most // each
    if fitting >= wanted:
        return wanted
    fitting -= fitting % _UNIT
    if not room.may_shrink or fitting == 0:
        raise RequestError(
            f"{room.slots} slots of {wanted} tokens take {wanted * each / 1e9:.1f} GB for caches.",
            allowed=f"{most / 1e9:.1f} GB: "
            + ("the limit cache_bytes" if room.cache_bytes else "half of the free device memory"),
            fix="lower the server's limits `context_tokens` or `slots`",
        )
    logging.getLogger(__name__).warning(
        "requests may have %d tokens, not %d: %d slots of them take the memory that caches may "
        "have; with a lower limit `slots` they may have more",
        fitting,
        wanted,
        room.slots,
    )
    return fitting
