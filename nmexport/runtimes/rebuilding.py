"""The commands that build, or rebuild, this installation's libraries."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from nmexport.resources import NATIVE_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
INCLUDE_VARIABLE = "NMEXPORT_ORT_INCLUDE"
"""As `plugins/build_hook.py` calls the folder of ONNX Runtime's headers."""
_WHEEL_MACHINES = ("x86_64", "aarch64")  # that ziglang's compiler is told to aim at
_ARCHIVES = {"x86_64": "x64", "aarch64": "aarch64"}  # of ONNX Runtime's releases
_RELEASES = "https://github.com/microsoft/onnxruntime/releases/download"


def compiler() -> str | None:
    """Find a C++ compiler; None where there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def source_tree() -> Path | None:
    """The source tree that this package runs from; None where it was installed from a wheel."""
    root = NATIVE_FOLDER.parent.parent
    return root if (root / "plugins" / "build_hook.py").is_file() else None


def rebuild_command(*, why_missing: str | None = None) -> str:
    """Return the command that builds this installation's native library.

    Args:
        why_missing: What the last build said; where it lacked ONNX Runtime's headers, the command
            fetches them.
    """
    root, machine = source_tree(), platform.machine()
    if root is None:  # the index has wheels with the library in them
        return f"{_pip()} nmexport"
    settings = []
    if compiler() is None and machine in _WHEEL_MACHINES:  # then pip brings one
        settings.append(f"NMEXPORT_WHEEL_MACHINE={machine}")
    command = f"{_pip()} --editable {shlex.quote(str(root))}"
    archive = _archive(machine)
    if INCLUDE_VARIABLE in (why_missing or "") and archive is not None:
        settings.append(f"{INCLUDE_VARIABLE}=$PWD/{archive}/include")
        release = f"{_RELEASES}/v{archive.rpartition('-')[2]}/{archive}.tgz"
        return f"curl -L {release} | tar -xz && {' '.join([*settings, command])}"
    return " ".join([*settings, command])


def cuda_command() -> str:
    """Return the command that builds the native library with kernels for this machine's GPUs."""
    root = source_tree()
    if root is None:
        return f"NMEXPORT_CUDA=native {_pip()} --no-binary nmexport nmexport"
    nvcc = "" if shutil.which("nvcc") else f'CUDACXX="$({_plugin_script(root)} --nvcc)" '
    return f"{nvcc}NMEXPORT_CUDA=native {_pip()} --editable {shlex.quote(str(root))}"


def plugin_command() -> str:
    """Return the command that builds the TensorRT plugin."""
    root = source_tree()
    if root is None:
        return "make plugin (in a source tree; fetches nvcc and TensorRT's headers where missing)"
    return _plugin_script(root)


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip install --no-deps --force-reinstall"


def _plugin_script(root: Path) -> str:
    script = root / "plugins" / "tensorrt" / "build.py"
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"


def _archive(machine: str) -> str | None:
    """Name of ONNX Runtime's release archive that fits what is installed here."""
    try:
        installed = version("onnxruntime")
    except PackageNotFoundError:
        return None
    kind = _ARCHIVES.get(machine)
    return None if kind is None else f"onnxruntime-linux-{kind}-{installed}"
