"""Large arrays in a temporary file, which is gone when the process ends."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def scratch_array(shape: tuple[int, ...], folder: Path | None) -> NDArray[np.float32]:
    """Allocate an uninitialised float32 array in a file that nobody else sees.

    The file has no name, or loses it at once: it goes with the array, however the process ends.

    Args:
        shape: Of the array.
        folder: On a disk with room; None is the system's folder for temporary files.

    Raises:
        OSError: if the disk has no room for it: later, writing would end the process.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(np.float32).itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.memmap(file, np.float32, "r+", shape=shape)
