"""Build the native library as part of `pip install`, or say why it could not be built.

A machine without a compiler or without ONNX Runtime's headers still gets a working package: the
exported models run through their function bodies. The reason is left beside the place of the
library, where `nmexport doctor` reads it.

A wheel for others (`make wheel`, `plugins/wheel.py`) is compiled by the Clang that the package
ziglang carries, against the symbols of an old glibc and with the C++ library inside. Such a build
fails where the library does.
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
MACHINE_VARIABLE = "NMEXPORT_WHEEL_MACHINE"
"""The processor of a wheel for others, one of `MACHINES`; unset builds for this machine."""
MACHINES = ("x86_64", "aarch64")
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
# The first time ziglang's compiler makes its own C++ library too.
_WHEEL_TIMEOUT_S = 3600


class BuildError(Exception):
    """The library cannot be built here; the message says why and what would mend it."""


class NativeBuildHook(BuildHookInterface):
    """Configures, builds and installs `plugins/` into `nmexport/_native/`."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """CMake and Ninja from the package index, where the machine has none; ziglang if asked."""
        if self.target_name != "wheel":
            return []
        tools = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        return [*tools, "ziglang"] if MACHINE_VARIABLE in os.environ else tools

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build for a wheel, editable or not; a source distribution carries the sources only."""
        del version
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        native = root / "nmexport" / "_native"
        machine = os.environ.get(MACHINE_VARIABLE)
        try:
            native.mkdir(parents=True, exist_ok=True)
            # What this build does not make, such as the TensorRT plugin, stays.
            for stale in (*native.glob("libnmexport_onnxruntime.*"), native / FAILURE_FILE):
                stale.unlink(missing_ok=True)
            build_library(root, native, str(self.metadata.version), machine)
        except (BuildError, OSError) as error:
            if machine is not None:  # others would get a wheel without its reason to be
                raise
            self.app.display_warning(
                f"nmexport: the native library was not built: {error}\n"
                "Models will run through their ONNX function bodies, which is slower."
            )
            if native.is_dir():
                (native / FAILURE_FILE).write_text(f"{error}\n", encoding="utf-8")
            return
        build_data["pure_python"] = False
        # auditwheel puts the glibc in place of "linux", once it has read the library's symbols.
        platform = _platform_tag() if machine is None else f"linux_{machine}"
        build_data["tag"] = f"py3-none-{platform}"


def build_library(root: Path, destination: Path, version: str, machine: str | None = None) -> None:
    """Build `plugins/` and install the library into `destination`.

    Args:
        root: The source tree.
        destination: Where the library goes.
        version: The package's, which the library tells.
        machine: One of `MACHINES` for a library that other machines can load; None builds with the
            compiler found, for this one.

    Raises:
        BuildError: if a tool or the headers are missing, or the build fails.
    """
    compiler = compiler_options(root, machine)
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
            *compiler,
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DONNXRUNTIME_INCLUDE_DIR={include}",
            f"-DNMEXPORT_VERSION={version}",
            *cuda,
        ]
    )
    _run(
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)],
        timeout_s=_CUDA_TIMEOUT_S if cuda else _WHEEL_TIMEOUT_S if machine else _TIMEOUT_S,
    )
    _run(["cmake", "--install", str(build), "--prefix", str(destination)])


def compiler_options(root: Path, machine: str | None) -> list[str]:
    """CMake's options that choose the compiler: none for the one it finds itself.

    Args:
        root: The source tree.
        machine: One of `MACHINES`, or None for this machine's own compiler.

    Raises:
        BuildError: if there is no compiler, or the machine is none of `MACHINES`.
    """
    if machine is None:
        if "CXX" not in os.environ and not any(shutil.which(name) for name in _COMPILERS):
            raise BuildError("no C++ compiler found; install one (Debian: apt-get install g++)")
        return []
    if machine not in MACHINES:
        raise BuildError(f"{MACHINE_VARIABLE}={machine} is none of {', '.join(MACHINES)}")
    zig = importlib.util.find_spec("ziglang")
    if zig is None or zig.origin is None:
        raise BuildError("the package ziglang is not installed; install it (pip install ziglang)")
    return [
        f"-DCMAKE_TOOLCHAIN_FILE={root / 'plugins' / 'zig.cmake'}",
        f"-DNMEXPORT_ZIG={Path(zig.origin).with_name('zig')}",
        f"-DNMEXPORT_MACHINE={machine}",
    ]


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
