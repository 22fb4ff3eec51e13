"""Serves logits of whole windows, computed layer by layer, like a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nmexport.runtimes.session import Limits, Session
from nmexport.store.scratch import scratch_array

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.progress import Progress


_NO_CACHE = object()


class Precomputed(Session):
    """Answers for the windows that it was made with, each as a whole prompt.

    All windows go through a layer before the next one is read from disk, so the answers of all are
    computed at once and lie in a file, `[windows, L, V]` float32.
    """

    limits = Limits(batch=1)

    def __init__(
        self,
        model: LayerwiseModel,
        windows: NDArray[np.int64],
        *,
        progress: Progress,
        label: str,
        folder: Path | None = None,
        substitutes: Mapping[str, Callable[[], nn.Module]] | None = None,
        decodes_second_half: bool = False,
    ) -> None:
        """Run all windows `[W, L]` through the model.

        Args:
            model: The dense model.
            windows: Token ids.
            progress: Counts layers.
            label: What it counts them under.
            folder: On a disk with room for the answers; None is the system's.
            substitutes: Modules in place of linears, see `LayerwiseModel.run`.
            decodes_second_half: They take the second half of a window for decoded tokens.

        Raises:
            OSError: if the disk has no room.
        """
        self.decodes_second_half = decodes_second_half
        self._vocabulary_size: int = model.model.config.get_text_config().vocab_size
        self._logits = scratch_array((*windows.shape, self._vocabulary_size), folder)
        self._places = {window.tobytes(): place for place, window in enumerate(windows)}

        def keep(number: int, logits: torch.Tensor) -> None:
            self._logits[number] = logits.float().numpy()

        model.run(
            torch.from_numpy(windows),
            progress=progress,
            label=label,
            logits_kept=0,
            use_logits=keep,
            substitutes=substitutes,
        )

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    def extend(
        self, cache: object, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], object]:
        """Look up logits `[1, L, V]` of one of the windows `[1, L]`.

        Raises:
            KeyError: if it is none of them.
            RuntimeError: if it is to go on from a cache.
        """
        if cache is not None:
            raise RuntimeError("a model that runs layer by layer has no cache to decode with")
        place = self._places[input_ids.tobytes()]
        return np.array(self._logits[place : place + 1]), _NO_CACHE

    def close(self) -> None:
        """Free the answers."""
        self._places = {}
        self._logits = np.empty((0, 0, 0), np.float32)
