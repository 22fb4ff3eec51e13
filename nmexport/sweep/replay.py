"""Computes a dense model's logits once, for every cell that is compared with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.runtimes.session import Limits, Session
from nmexport.store.scratch import scratch_array

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

# What may be kept on disk: 16 windows of 512 tokens of SmolLM2 are 1.6 GB.
_KEPT_BYTES = 4 << 30


@dataclass(frozen=True)
class _Replayed:
    """Stands for the cache of a prompt whose logits were looked up."""

    prompt: NDArray[np.int64]


class Replay(Session):
    """A session that opens the model only for prompts that it has not seen.

    Answers lie in a file that goes with the process; those beyond its size are computed anew.
    """

    limits = Limits(batch=1)

    def __init__(self, opened: Callable[[], Session], prompts: int, folder: Path) -> None:
        """Store logits in a folder.

        Args:
            opened: Opens the model.
            prompts: How many different prompts to expect, all of one length.
            folder: On a disk with room.
        """
        self._opened = opened
        self._prompts = prompts
        self._folder = folder
        self._session: Session | None = None
        self._answers: NDArray[np.float32] | None = None
        self._places: dict[bytes, int] = {}
        self._width = 0

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._width or self._model().vocabulary_size

    def extend(
        self, cache: Any | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], Any]:
        """Look up a prompt `[1, S]`, or run the model; continuations always run."""
        if isinstance(cache, _Replayed):  # the model has not run this prompt yet
            _, cache = self._model().extend(None, cache.prompt)
        if cache is not None:
            return self._model().extend(cache, input_ids)
        place = self._places.get(input_ids.tobytes())
        if place is not None and self._answers is not None:
            return np.array(self._answers[place : place + 1]), _Replayed(input_ids)
        logits, cache = self._model().extend(None, input_ids)
        self._keep(input_ids, logits)
        return logits, cache

    def close(self) -> None:
        """Free the model; its stored logits stay."""
        self.cache = None
        if self._session is not None:
            self._session.close()
        self._session = None

    def forget(self) -> None:
        """Free the model and its stored logits."""
        self.close()
        self._answers, self._places = None, {}

    def _model(self) -> Session:
        if self._session is None:
            self._session = self._opened()
            self._width = self._session.vocabulary_size
        return self._session

    def _keep(self, input_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        if self._answers is None:
            shape = (self._prompts, *logits.shape[1:])
            if 4 * int(np.prod(shape)) > _KEPT_BYTES:
                return
            self._answers = scratch_array(shape, self._folder)
        place = len(self._places)
        if place < self._prompts and logits.shape[1:] == self._answers.shape[1:]:
            self._answers[place] = logits[0]
            self._places[input_ids.tobytes()] = place
