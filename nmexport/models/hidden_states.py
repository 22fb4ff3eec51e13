"""Hidden states that wait between the layers of a model, in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nmexport.store.scratch import scratch_array

if TYPE_CHECKING:
    from pathlib import Path


class HiddenStates:
    """Hidden states of all samples in a file of their own, `[samples, 1, length, width]`."""

    def __init__(self, samples: torch.Tensor, width: int, folder: Path | None) -> None:
        """Make room for them.

        Args:
            samples: `[samples, length]`
            width: Elements of one hidden state.
            folder: On a disk with room; None is the system's.

        Raises:
            OSError: if the disk has no room.
        """
        count, length = samples.shape
        self._states = torch.from_numpy(scratch_array((count, 1, length, width), folder))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._states)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Copy one sample's: `[1, length, width]` float32."""
        return self._states[number].clone()

    def __setitem__(self, number: int, hidden: torch.Tensor) -> None:
        """Keep one sample's."""
        self._states[number].copy_(hidden)

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy several samples' `[B]`: `[B, length, width]` float32."""
        return self._states[rows].flatten(0, 1)

    def put(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """Store several samples' `[B, length, width]`."""
        self._states[rows] = hidden.unsqueeze(1).to(self._states)
