"""Finds which targets work on this machine, what the others lack, and how to fix it.

Nothing heavy is imported: packages are looked up, not loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nmexport.errors import EnvironmentFault
from nmexport.runtimes import native, rebuilding
from nmexport.runtimes.tensorrt import library as tensorrt_library

if TYPE_CHECKING:
    from nmexport.runtimes.engine import TensorRTTarget
    from nmexport.runtimes.native import LibraryDescription

_GPU_RUNTIME = "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
_FOR_ANOTHER_GPU = "nmexport build --target tensorrt-rtx --compute-capability 8.9 --model MODEL"


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that is missing here."""

    what: str
    fix: str
    """A command, or what to do."""
    needed: bool = True
    """Without it the target does not work; otherwise it works less well."""


@dataclass(frozen=True, kw_only=True)
class TargetState:
    """A target, and what it lacks here."""

    target: str
    missing: tuple[Missing, ...] = ()

    @property
    def works(self) -> bool:
        """Nothing needed is missing."""
        return not any(item.needed for item in self.missing)

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {
            "target": self.target,
            "works": self.works,
            "missing": [vars(item) for item in self.missing],
        }


@dataclass(frozen=True, kw_only=True)
class NativeLibrary:
    """The native op library of this machine."""

    path: str | None = None
    description: LibraryDescription | None = None
    why_missing: str | None = None


def diagnose() -> list[TargetState]:
    """Return the state of every target."""
    return [
        TargetState(target="onnxruntime", missing=tuple(_onnxruntime())),
        TargetState(target="tensorrt", missing=tuple(_tensorrt("tensorrt"))),
        TargetState(target="tensorrt-rtx", missing=tuple(_tensorrt("tensorrt-rtx"))),
    ]


def _onnxruntime() -> list[Missing]:
    missing = []
    if not is_installed("onnxruntime"):
        missing.append(Missing(what="the package onnxruntime", fix="pip install onnxruntime"))
    return [*missing, *_native_library(), *_on_gpu()]


def _native_library() -> list[Missing]:
    """List what the native library lacks; without it the function bodies run."""
    library = native_library()
    if library.why_missing is None:
        return []
    what = f"the native op library; without it models run slower than dense. {library.why_missing}"
    fix = rebuilding.rebuild_command(why_missing=library.why_missing)
    return [Missing(what=what, fix=fix, needed=False)]


def _on_gpu() -> list[Missing]:
    """List what ONNX Runtime lacks to run on the GPU that is here."""
    if not tensorrt_library.gpu_is_usable():
        return []
    missing = []
    if not is_distributed("onnxruntime-gpu"):
        what = "the package onnxruntime-gpu, to run models on the GPU"
        missing.append(Missing(what=what, fix=_GPU_RUNTIME, needed=False))
    library = native_library()
    if library.description is not None and not library.description.get("cuda"):
        what = "the CUDA kernels in the native op library, to run models on the GPU"
        missing.append(Missing(what=what, fix=rebuilding.cuda_command(), needed=False))
    return missing


def _tensorrt(target: TensorRTTarget) -> list[Missing]:
    """List what building an engine lacks, then what running it lacks."""
    needs = [
        Missing(what=f"the package {package}", fix=f"pip install {package}")
        for package, module in (
            (target, target.replace("-", "_")),
            ("polygraphy", "polygraphy"),
        )
        if not is_installed(module)
    ]
    if tensorrt_library.find_plugin() is None:
        needs.append(Missing(what="the TensorRT plugin library", fix=tensorrt_library.FIX_PLUGIN))
    if not tensorrt_library.gpu_is_usable():
        builds_without = target == "tensorrt-rtx"
        needs.append(
            Missing(
                what="an NVIDIA GPU with its driver"
                + (" to run an engine; it is built without one" if builds_without else ""),
                fix=_FOR_ANOTHER_GPU,
                needed=not builds_without,
            )
        )
    elif not is_installed("cuda.bindings"):
        needs.append(
            Missing(
                what="the package cuda-bindings, to run an engine",
                fix="pip install cuda-bindings",
                needed=False,
            )
        )
    return needs


def is_installed(module: str) -> bool:
    """Tell whether a module could be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def is_distributed(package: str) -> bool:
    """Tell whether a package of the index is installed, by its own name."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def native_library() -> NativeLibrary:
    """Describe the native op library, and whether it loads here."""
    path = native.find_library()
    if path is None:
        return NativeLibrary(why_missing=native.why_missing())
    try:
        return NativeLibrary(path=str(path), description=native.describe_library(path))
    except EnvironmentFault as fault:
        return NativeLibrary(path=str(path), why_missing=fault.problem)
