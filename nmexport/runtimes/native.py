"""Finds the native op library, or says why it is missing."""

from __future__ import annotations

import ctypes
import json
import math
import sys
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.resources import NATIVE_FOLDER, resource_path
from nmexport.runtimes.engine import REBUILD
from nmexport.runtimes.rebuilding import rebuild_command
from nmexport.store.artifact import file_digest

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Engine

THREADS_ENTRY = "custom_op.nmexport.threads"
"""Session configuration entry that tells the library how many threads the session has, which ONNX
Runtime does not; set before the library is registered. It changes speed, never a result."""

HUGE_PAGES_ENTRY = "custom_op.nmexport.huge_pages"
"""Session configuration entry: "1" has the library copy constant weights into huge pages, "0"
leaves them in the mapped file. The same."""

_FOLDER = NATIVE_FOLDER
_FAILURE_FILE = "BUILD_FAILED.txt"  # written by plugins/build_hook.py


def library_name() -> str:
    """File name of the library of ONNX Runtime custom ops on this platform."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    return f"libnmexport_onnxruntime{suffix}"


def find_library(folder: Path = _FOLDER) -> Path | None:
    """Find the library; None where it was not built."""
    path = folder / library_name()
    return path if path.is_file() else None


def require_library(folder: Path = _FOLDER) -> Path:
    """Path of the library.

    Raises:
        EnvironmentFault: if it was not built; the message says why and how to fix it.
    """
    path = find_library(folder)
    if path is None:
        raise EnvironmentFault(
            f"The native op library is missing: {why_missing(folder)}",
            allowed=str(folder / library_name()),
            fix=rebuild_command(why_missing=why_missing(folder)),
        )
    return path


def engine_library(engine: Engine) -> Path | None:
    """Find the native library that an engine was made with.

    Raises:
        EnvironmentFault: if this machine has no native library and the engine needs it.
        ArtifactError: if the library found is another one.
    """
    if engine.library is None:
        return None
    library = engine.bundled_library or require_library()
    if file_digest(library) != engine.library.sha256:
        raise ArtifactError(
            f"The engine was made with another build of {engine.library.file.name} than {library}.",
            allowed=f"sha256 {engine.library.sha256}",
            fix=REBUILD,
        )
    return library


def why_missing(folder: Path = _FOLDER) -> str | None:
    """Say why the library is missing; None where it is there."""
    if find_library(folder) is not None:
        return None
    failure = folder / _FAILURE_FILE
    if failure.is_file():
        return failure.read_text(encoding="utf-8").strip()
    return "the package was not built with it (no build record found)"


class LibraryDescription(TypedDict):
    """The native library's description of itself."""

    version: str
    """The version of the package that it was built from."""
    ort_api_version: int
    domain: str
    opset_version: int
    cuda: str
    """Compute capabilities of its CUDA kernels, joined by commas; empty without any."""
    ops: list[object]
    """Each with its attributes."""
    variant: str
    """Instruction set of the kernels that this processor runs."""


def describe_library(path: Path) -> LibraryDescription:
    """Ask the library for its version, instruction-set variant and registered ops.

    Raises:
        EnvironmentFault: if it cannot be loaded or is not ours.
    """
    library = _load(path)
    library.nmexport_describe.restype = ctypes.c_char_p
    library.nmexport_variant.restype = ctypes.c_char_p
    document: LibraryDescription = json.loads(library.nmexport_describe())
    document["variant"] = library.nmexport_variant().decode()
    return document


def check_opset(path: Path) -> None:
    """Refuse a library of another version of the op contract.

    ONNX Runtime would not take its ops for the nodes of our files: it would run their function
    bodies, many times slower, and say nothing.

    Raises:
        EnvironmentFault: if the library was built from other sources than this package.
    """
    built = describe_library(path)["opset_version"]
    contract = json.loads(resource_path("contract.json").read_text(encoding="utf-8"))
    if built != contract["opset_version"]:
        raise EnvironmentFault(
            f"Native op library {path} is of version {built} of the op contract.",
            allowed=f"version {contract['opset_version']}",
            fix=rebuild_command(),
        )


CUDA_PLANS_FILE = "cuda_plans.csv"
"""Next to the library: plans measured on this machine's GPU by `nmexport bench cuda --save`."""


def use_cuda_plans(path: Path) -> bool:
    """Give the library the plans measured next to it; False where there are none.

    They change speed alone: which kernel shape, and where a dense product is faster.

    Raises:
        EnvironmentFault: if the file is not such a table.
    """
    plans = path.with_name(CUDA_PLANS_FILE)
    library = _load(path)
    if not plans.is_file() or not hasattr(library, "nmexport_use_cuda_plans"):
        return False
    library.nmexport_use_cuda_plans.argtypes = [ctypes.c_char_p]
    line = library.nmexport_use_cuda_plans(plans.read_bytes())
    if line:
        raise EnvironmentFault(
            f"Line {line} of {plans} is no row of a table of CUDA plans.",
            fix="delete the file, or measure again: nmexport bench cuda --save",
        )
    return True


def device_visible(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros in memory of the host that kernels on the GPU read and write at the same address.

    What the host puts there needs no copy to the device, and what a kernel puts there none back.

    Args:
        path: The library, with CUDA kernels.
        shape: Of the array, with an element at least.
        dtype: Its type.

    Raises:
        EnvironmentFault: if the library has no CUDA kernels, or the driver gives no such memory.
    """
    library = _load(path)
    if not hasattr(library, "nmexport_cuda_host_memory"):
        raise EnvironmentFault(f"{path} carries no CUDA kernels.", fix=rebuild_command())
    library.nmexport_cuda_host_memory.argtypes = [ctypes.c_size_t]
    library.nmexport_cuda_host_memory.restype = ctypes.c_void_p
    library.nmexport_cuda_free_host_memory.argtypes = [ctypes.c_void_p]
    size = math.prod(shape) * dtype.itemsize
    address = library.nmexport_cuda_host_memory(size)
    if not address:
        raise EnvironmentFault(
            f"The CUDA driver gives no {size} bytes of memory of the host.",
            fix="`nmexport doctor` says more of the GPU; `ulimit -l` limits such memory",
        )
    memory = (ctypes.c_byte * size).from_address(address)
    # At the end of the process the driver frees it itself, perhaps before this could.
    weakref.finalize(memory, library.nmexport_cuda_free_host_memory, address).atexit = False
    array: NDArray[Any] = np.frombuffer(memoryview(memory), dtype).reshape(shape)
    array[...] = 0
    return array


def wait_for_device(path: Path) -> None:
    """Wait for all work on the GPU; other threads keep running.

    Args:
        path: The library, with CUDA kernels.

    Raises:
        RuntimeError: if something of it failed.
    """
    code = _load(path).nmexport_cuda_wait()
    if code:
        raise RuntimeError(f"the GPU failed: CUDA error {code}")


def free_device_memory(path: Path) -> int:
    """Free bytes of GPU memory; 0 where the driver does not say.

    Args:
        path: The library, with CUDA kernels.
    """
    library = _load(path)
    library.nmexport_cuda_free_memory.restype = ctypes.c_size_t
    return int(library.nmexport_cuda_free_memory())


def use_variant(path: Path, name: str) -> bool:
    """Use an instruction-set variant in this process; False where the CPU lacks it.

    Results do not change, only speed: for tests and measurements.
    """
    library = _load(path)
    library.nmexport_use_variant.argtypes = [ctypes.c_char_p]
    return bool(library.nmexport_use_variant(name.encode()))


def read_memory(path: Path, address: int, size: int) -> int:
    """Read `size` bytes in order, at the full speed of one thread; without the interpreter's lock.

    Returns the exclusive or of whole 256-byte blocks' words: for measurements of bandwidth.
    """
    library = _load(path)
    library.nmexport_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.nmexport_read.restype = ctypes.c_uint64
    return int(library.nmexport_read(address, size))


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        _ = library.nmexport_describe
    except (OSError, AttributeError) as error:
        raise EnvironmentFault(
            f"{path} cannot be loaded: {error}", allowed="the library that this package built"
        ) from error
    return library
