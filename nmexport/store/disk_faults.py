"""Explains what a disk refuses: full, unwritable, or a path that cannot be a folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from nmexport.errors import WorkDirectoryError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL_IN_WORDS = ("no space left on device", "os error 28", "disk quota exceeded")


def disk_fault(root: Path, error: BaseException) -> WorkDirectoryError | None:
    """Say what the disk refused below `root`; None where the error is another one.

    Libraries wrap what the system said in errors of their own, so the text counts too.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL or any(words in str(error).lower() for words in _FULL_IN_WORDS):
        free = shutil.disk_usage(_existing(root)).free
        return WorkDirectoryError(
            f"The disk of {root} is full ({free / 1e9:.1f} GB free): {error}",
            fix="free space, or name a folder on another disk with --work DIR; "
            "what was finished is kept, and the same command goes on from there",
        )
    if code in _UNWRITABLE and _is_within(root, error):
        return WorkDirectoryError(
            f"The work directory {root} cannot be written: {error}",
            allowed="a folder on a writable disk that belongs to you",
            fix="name another folder with --work DIR",
        )
    if code == errno.EEXIST and root.is_symlink() and not root.exists():
        return WorkDirectoryError(
            f"The work directory {root} cannot be made: it is a link to "
            f"{root.readlink()}, which is not there.",
            fix="make that folder (or mount its disk), or name another with --work DIR",
        )
    if code in {errno.ENOTDIR, errno.EEXIST} and not _existing(root).is_dir():
        return WorkDirectoryError(
            f"The work directory {root} cannot be made: {_existing(root)} is a file.",
            fix="name another folder with --work DIR",
        )
    cause = error.__cause__
    return disk_fault(root, cause) if cause is not None else None


def _is_within(root: Path, error: BaseException) -> bool:
    """Tell whether a refused path is in the work directory, not, say, a model file."""
    name = getattr(error, "filename", None)
    if name is None:
        return True
    path, root = Path(os.fsdecode(name)).absolute(), root.absolute()
    return path.is_relative_to(root) or root.is_relative_to(path)


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
