"""Where the native op library is, and why it is not there if it is not."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from nmexport.errors import EnvironmentFault

_FOLDER = Path(__file__).resolve().parent.parent / "_native"
_FAILURE_FILE = "BUILD_FAILED.txt"  # written by plugins/build_hook.py
_MEND = "python -m pip install --no-deps --force-reinstall --editable . (with a C++ compiler)"


def library_name() -> str:
    """File name of the library of ONNX Runtime custom ops on this platform."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    return f"libnmexport_onnxruntime{suffix}"


def find_library(folder: Path = _FOLDER) -> Path | None:
    """Path of the library, or None where it was not built."""
    path = folder / library_name()
    return path if path.is_file() else None


def require_library(folder: Path = _FOLDER) -> Path:
    """Path of the library.

    Raises:
        EnvironmentFault: if it was not built; the message says why and how to mend it.
    """
    path = find_library(folder)
    if path is None:
        raise EnvironmentFault(
            f"The native op library is missing: {why_missing(folder)}",
            allowed=str(folder / library_name()),
            fix=_MEND,
        )
    return path


def why_missing(folder: Path = _FOLDER) -> str | None:
    """Why the library is not there, in words; None where it is there."""
    if find_library(folder) is not None:
        return None
    failure = folder / _FAILURE_FILE
    if failure.is_file():
        return failure.read_text(encoding="utf-8").strip()
    return "the package was not built with it (no build record found)"


def library_digest(folder: Path = _FOLDER) -> str | None:
    """SHA-256 of the library's bytes, or None where there is none."""
    path = find_library(folder)
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def describe_library(path: Path) -> dict[str, Any]:
    """What the library says of itself: version, instruction-set variant, the ops it registers.

    Raises:
        EnvironmentFault: if it cannot be loaded or is not ours.
    """
    library = _load(path)
    library.nmexport_describe.restype = ctypes.c_char_p
    library.nmexport_variant.restype = ctypes.c_char_p
    document: dict[str, Any] = json.loads(library.nmexport_describe())
    return {**document, "variant": library.nmexport_variant().decode()}


def use_variant(path: Path, name: str) -> bool:
    """Make this process use an instruction-set variant; False where the processor lacks it.

    Results do not change, only speed: for tests and measurements.
    """
    library = _load(path)
    library.nmexport_use_variant.argtypes = [ctypes.c_char_p]
    return bool(library.nmexport_use_variant(name.encode()))


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        _ = library.nmexport_describe
    except (OSError, AttributeError) as error:
        raise EnvironmentFault(
            f"{path} cannot be loaded: {error}", allowed="the library that this package built"
        ) from error
    return library
