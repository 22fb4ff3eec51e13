"""Folders that are dear to make and made once a run, whichever workers and files ask for them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FOLDER: list[Path] = []
"""Where they lie; empty outside a run of pytest. Set in conftest.py."""


def kept(key: str, make: Callable[[Path], None], output: Path) -> None:
    """Fill `output`, an existing folder, with what `make` writes for this key.

    The copy is the caller's own: it may change its files.
    """
    if not FOLDER:
        make(output)
        return
    place = FOLDER[0] / key
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            partial = place.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            make(partial)
            partial.rename(place)
    shutil.copytree(place, output, dirs_exist_ok=True)
