"""Keep kernel timings between builds: outside of artifacts, one file for each kind of GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.runtimes.tensorrt.kernel_cache import cache_file

if TYPE_CHECKING:
    from pathlib import Path


def timing_cache_path(*, runtime: str, version: str, device: str) -> Path:
    """File of the timings of one runtime version on one device; its folder is made.

    Args:
        runtime: Such as `tensorrt`.
        version: Of the runtime: timings of another are of no use to it.
        device: The GPU's name.
    """
    path = cache_file(runtime, version, device, suffix="timing")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
