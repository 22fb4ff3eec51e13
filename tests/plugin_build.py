"""The plugin's build script, and what it builds for the tests."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def build_script() -> ModuleType:
    path = ROOT / "plugins" / "tensorrt" / "build.py"
    spec = importlib.util.spec_from_file_location("nmexport_plugin_build", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def built(what: str, folder: Path) -> Path:
    """Call a build function; skip the test where compiler or headers cannot be had."""
    script = build_script()
    if not script.find_tool("cmake") or not shutil.which("c++"):
        pytest.skip("no cmake or no C++ compiler")
    try:
        script.find_headers()
        script.find_toolkit()
    except script.BuildError as error:
        pytest.skip(f"no TensorRT or CUDA headers: {error}")
    path: Path = getattr(script, what)(folder)
    return path
