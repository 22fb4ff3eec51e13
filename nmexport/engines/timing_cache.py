"""Where timings of kernels are kept between builds: outside of artifacts, a file a kind of GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder of this program."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nmexport"


def timing_cache_path(*, runtime: str, version: str, device: str) -> Path:
    """File of the timings of one runtime version on one device; its folder is made.

    Args:
        runtime: Such as `tensorrt`.
        version: Of the runtime: timings of another are of no use to it.
        device: The GPU's name.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{runtime}-{version}-{device}".lower()).strip("-")
    return folder / f"{name}.timing"
