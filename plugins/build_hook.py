"""Build the native library as part of `pip install`, or say why it could not be built.

A machine without a compiler or without ONNX Runtime's headers still gets a working package: the
exported models run through their function bodies. The reason is left beside the place of the
library, where `nmexport doctor` reads it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

INCLUDE_VARIABLE = "NMEXPORT_ORT_INCLUDE"
CUDA_VARIABLE = "NMEXPORT_CUDA"
"""`1` for the CUDA kernels too, for all supported GPUs; `native` for those of this machine; or
compute capabilities such as `80;90`. They take nvcc, many minutes and tens of megabytes, so nobody
gets them unasked."""
FAILURE_FILE = "BUILD_FAILED.txt"
_HEADER = "onnxruntime_c_api.h"
_SYSTEM_INCLUDES = (
    "/usr/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include/onnxruntime",
    "/usr/local/include",
)
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 1200
# The kernels for all GPUs take ten minutes of processor time and more: room for one slow processor.
_CUDA_TIMEOUT_S = 7200


class BuildError(Exception):
    """The library cannot be built here; the message says why and what would mend it."""


class NativeBuildHook(BuildHookInterface):
    """Configures, builds and installs `plugins/` into `nmexport/_native/`."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """CMake and Ninja from the package index, where the machine has none."""
        if self.target_name != "wheel":
            return []
        return [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build for a wheel, editable or not; a source distribution carries the sources only."""
        del version
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        native = root / "nmexport" / "_native"
        try:
            native.mkdir(parents=True, exist_ok=True)
            # What this build does not make, such as the TensorRT plugin, stays.
            for stale in (*native.glob("libnmexport_onnxruntime.*"), native / FAILURE_FILE):
                stale.unlink(missing_ok=True)
            build_library(root, native, str(self.metadata.version))
        except (BuildError, OSError) as error:
            self.app.display_warning(
                f"nmexport: the native library was not built: {error}\n"
                "Models will run through their ONNX function bodies, which is slower."
            )
            if native.is_dir():
                (native / FAILURE_FILE).write_text(f"{error}\n", encoding="utf-8")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"


def build_library(root: Path, destination: Path, version: str) -> None:
    """Build `plugins/` and install the library into `destination`.

    Raises:
        BuildError: if a tool or the headers are missing, or the build fails.
    """
    compiler = os.environ.get("CXX")
    if compiler is None and not any(shutil.which(name) for name in _COMPILERS):
        raise BuildError("no C++ compiler found; install one (Debian: apt-get install g++)")
    if shutil.which("cmake") is None:
        raise BuildError("cmake not found; install it (pip install cmake ninja)")
    cuda = cuda_options(os.environ.get(CUDA_VARIABLE, ""))
    include = find_headers(root)
    build = root / "build" / "native"
    # A tree configured by another CMake, or with another compiler, is not worth reusing.
    shutil.rmtree(build, ignore_errors=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run(
        [
            "cmake",
            "-S",
            str(root / "plugins"),
            "-B",
            str(build),
            *generator,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DONNXRUNTIME_INCLUDE_DIR={include}",
            f"-DNMEXPORT_VERSION={version}",
            *cuda,
        ]
    )
    _run(
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
        timeout_s=_CUDA_TIMEOUT_S if cuda else _TIMEOUT_S,
    )
    _run(["cmake", "--install", str(build), "--prefix", str(destination)])


def cuda_options(wanted: str) -> list[str]:
    """CMake's options for the CUDA kernels.

    Args:
        wanted: Value of `NMEXPORT_CUDA`: empty or 0 for none, 1 for all supported GPUs, `native`
            for the GPUs of this machine, or compute capabilities such as `80;90`.

    Raises:
        BuildError: if they are wanted and there is no nvcc, or the value is none of these.
    """
    if wanted in {"", "0"}:
        return []
    if wanted not in {"1", "native"} and not all(part.isdigit() for part in wanted.split(";")):
        raise BuildError(
            f"{CUDA_VARIABLE}={wanted} is none of 0, 1, native, or a list such as 80;90"
        )
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        raise BuildError(
            f"{CUDA_VARIABLE}={wanted} needs nvcc; install the CUDA toolkit or unset the variable"
        )
    chosen = [] if wanted == "1" else [f"-DNMEXPORT_CUDA_ARCHITECTURES={wanted}"]
    return ["-DNMEXPORT_CUDA=ON", *chosen]


def find_headers(root: Path) -> Path:
    """Folder of ONNX Runtime's C headers: named, installed, or fetched.

    Raises:
        BuildError: if they are nowhere to be had.
    """
    named = os.environ.get(INCLUDE_VARIABLE)
    if named:
        if not (Path(named) / _HEADER).is_file():
            raise BuildError(f"{INCLUDE_VARIABLE}={named} holds no {_HEADER}")
        return Path(named)
    for folder in _SYSTEM_INCLUDES:
        if (Path(folder) / _HEADER).is_file():
            return Path(folder)
    fetcher = _load_fetcher(root)
    try:
        return Path(fetcher.fetch(root / "build" / "onnxruntime-headers"))
    except (fetcher.FetchError, OSError) as error:
        raise BuildError(
            f"no ONNX Runtime headers ({error}); install them (Debian 13: apt-get install "
            f"libonnxruntime-dev; elsewhere the include folder of its release archive) and "
            f"set {INCLUDE_VARIABLE} to their folder"
        ) from error


def _load_fetcher(root: Path) -> Any:
    path = root / "plugins" / "onnxruntime" / "fetch_headers.py"
    spec = importlib.util.spec_from_file_location("nmexport_fetch_headers", path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _run(command: list[str], timeout_s: int = _TIMEOUT_S) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        last = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise BuildError("`" + " ".join(command) + "` failed:\n" + "\n".join(last))
