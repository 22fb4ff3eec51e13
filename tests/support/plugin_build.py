"""The plugin's build script, and what it builds for the tests: each library once, and checked."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = {"getCreators", "setLoggerFinder", "nmexport_describe_plugin", "nmexport_log_to"}


def load_script(path: Path) -> ModuleType:
    """Load a script that is no part of a package."""
    spec = importlib.util.spec_from_file_location(f"nmexport_script_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@functools.cache
def build_script() -> ModuleType:
    return load_script(ROOT / "plugins" / "tensorrt" / "build.py")


@functools.cache
def build_hook() -> ModuleType:
    """The wheel's build hook, which finds ONNX Runtime's headers."""
    pytest.importorskip("hatchling")
    return load_script(ROOT / "plugins" / "build_hook.py")


def cmake_tool(name: str = "cmake") -> str:
    """Path of cmake or ctest; skip the test where there is none."""
    tool = build_script().find_tool(name)
    if tool is None:
        pytest.skip(f"no {name}")
    return str(tool)


def configure(source: Path, folder: Path, *options: str) -> None:
    """Run CMake, with Ninja where it can be had."""
    ninja = build_script().find_tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    run_tool(cmake_tool(), "-S", source, "-B", folder, *generator, *options)


def build(folder: Path, *targets: str) -> None:
    """Build targets of a configured folder."""
    run_tool(cmake_tool(), "--build", folder, "--parallel", "2", "--target", *targets)


def run_tool(*command: Path | str, timeout_s: int = 3600) -> str:
    """Run a command that must succeed; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def built(what: str, folder: Path) -> Path:
    """Call a build function; skip the test where compiler or headers cannot be had."""
    _skip_unless_buildable()
    path: Path = getattr(build_script(), what)(folder)
    if path.suffix == ".so":
        check_linkage(path)
    return path


def build_whole_library(folder: Path) -> tuple[Path, str]:
    """The plugin for all supported GPUs, and what the compilers said."""
    _skip_unless_buildable()
    library = build_script().build_library(folder / "native", jobs=2, folder=folder, strict=True)
    return library, (folder / "build.log").read_text(encoding="utf-8")


def check_linkage(library: Path) -> None:
    """The library exports its entry points alone and takes nothing from a fixed folder.

    Of CUDA and TensorRT it needs no library: one is linked in, the other has loaded it.
    """
    names = _said("nm", "-D", "--defined-only", str(library))
    assert {line.split()[-1] for line in names.splitlines()} == ENTRY_POINTS
    dynamic = _said("readelf", "-d", str(library))
    for absent in ("RPATH", "RUNPATH", "cudart", "nvinfer"):
        assert absent not in dynamic


def _skip_unless_buildable() -> None:
    script = build_script()
    if not script.find_tool("cmake") or not shutil.which("c++"):
        pytest.skip("no cmake or no C++ compiler")
    try:
        script.find_headers()
        script.find_toolkit()
    except script.BuildError as error:
        pytest.skip(f"no TensorRT or CUDA headers: {error}")


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
