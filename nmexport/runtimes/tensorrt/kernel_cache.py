"""Kernels that TensorRT-RTX compiled on this machine's GPU, kept from one process to the next.

TensorRT-RTX compiles when an engine is opened and run, not when it is built: without what is kept
here, every process begins with that.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from nmexport.runtimes.engine import TensorRTEngine

_IDENTIFYING = 1 << 16  # bytes at either end of a plan


def cache_folder() -> Path:
    """Return the user's cache folder of this program."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nmexport"


def cache_file(*parts: str, suffix: str) -> Path:
    """Return a file of that folder, named by what its contents are for."""
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")
    return cache_folder() / f"{name}.{suffix}"


def kernel_cache_path(engine: TensorRTEngine, plan: bytes) -> Path:
    """Return the file of a plan's kernels; the runtime itself refuses those of another GPU."""
    digest = hashlib.sha256(plan[:_IDENTIFYING] + plan[-_IDENTIFYING:])
    digest.update(str(len(plan)).encode())
    return cache_file(engine.target, engine.version, digest.hexdigest()[:16], suffix="kernels")


def timing_cache_path(*, runtime: str, version: str, device: str) -> Path:
    """Return the file of a runtime version's kernel timings on one device; make its folder.

    Timings are kept between builds, outside of artifacts.

    Args:
        runtime: Such as `tensorrt`.
        version: Of the runtime: timings of another are of no use to it.
        device: The GPU's name.
    """
    path = cache_file(runtime, version, device, suffix="timing")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class KernelCache:
    """A runtime cache and its file; all contexts of an engine share it.

    Where the file cannot be read or written, kernels are compiled again: slower, never wrong.
    """

    def __init__(self, path: Path) -> None:
        """Keep the kernels in a file, which need not exist."""
        self._path = path
        self._cache: Any = None
        self._loaded = b""

    def attach(self, config: Any) -> None:
        """Give a runtime configuration the cache, which is read when the first one asks."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._load()
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled since; the file is replaced as a whole."""
        if self._cache is None:
            return
        kernels = bytes(self._cache.serialize())
        if kernels == self._loaded:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
                partial.write_bytes(kernels)
                partial.replace(self._path)
            self._loaded = kernels
        except OSError as error:
            logging.getLogger(__name__).warning("compiled kernels are not kept: %s", error)

    def _load(self) -> None:
        try:
            with self._lock():
                kept = self._path.read_bytes()
        except OSError:
            return
        if self._cache.deserialize(kept):
            self._loaded = kept

    def _lock(self) -> FileLock:
        return FileLock(self._path.with_name(f"{self._path.name}.lock"))
