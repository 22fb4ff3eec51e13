"""Check what a target needs to build an engine, and what an engine needs to run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError, EnvironmentFault, RecipeError
from nmexport.runtimes.engine import REBUILD
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.store.artifact import file_digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nmexport.runtimes.engine import TensorRTEngine, TensorRTTarget

_RTX = ", ".join(tensorrt_library.RTX_CAPABILITIES)


def check(target: TensorRTTarget, capabilities: Sequence[str]) -> None:
    """Refuse what could not be built here, without building.

    Args:
        target: TensorRT or TensorRT-RTX.
        capabilities: GPUs to build for; none is the GPU of this machine.

    Raises:
        RecipeError: if the target does not build for such GPUs.
        EnvironmentFault: if the runtime, Polygraphy, the plugin library or a GPU is missing here,
            or of another version.
    """
    tensorrt_library.load(target)
    check_gpus(target, capabilities)
    if find_spec("polygraphy") is None:
        raise EnvironmentFault(
            f"Target {target} needs the Python package polygraphy.", fix="pip install polygraphy"
        )
    tensorrt_library.check_plugin(tensorrt_library.require_plugin())
    tensorrt_library.prepare_parser(target)


def check_gpus(target: TensorRTTarget, capabilities: Sequence[str]) -> None:
    """Refuse GPUs that the target does not build for.

    Raises:
        RecipeError: if those named are such.
        EnvironmentFault: if none is named, and the one of this machine is such, or missing.
    """
    if target == "tensorrt" and capabilities:
        raise RecipeError(
            f"TensorRT builds for the GPU it runs on, not for {', '.join(capabilities)}.",
            allowed="no --compute-capability",
            fix="--target tensorrt-rtx builds for other GPUs",
        )
    foreign = [
        capability
        for capability in capabilities
        if capability not in tensorrt_library.RTX_CAPABILITIES
    ]
    if foreign:
        raise RecipeError(
            f"TensorRT-RTX does not run on compute capability {', '.join(foreign)}.",
            allowed=_RTX,
            fix="build on such a GPU with --target tensorrt, or take --target onnxruntime",
        )
    if capabilities:
        return
    if not tensorrt_library.gpu_is_usable():
        raise EnvironmentFault(
            f"No GPU is here, and target {target} was told of none to build for.",
            allowed=f"--target tensorrt-rtx with --compute-capability {_RTX}",
            fix="name one, for example --target tensorrt-rtx --compute-capability 8.9",
        )
    here = tensorrt_library.compute_capability()
    if target == "tensorrt-rtx" and here not in tensorrt_library.RTX_CAPABILITIES:
        raise EnvironmentFault(
            f"TensorRT-RTX does not run on this machine's GPU, of compute capability {here}.",
            allowed=_RTX,
            fix="take --target tensorrt, or name the GPU to build for with --compute-capability",
        )


def engine_plugin(engine: TensorRTEngine) -> Path | None:
    """Find the plugin library to load before the engine; None where the plan carries it.

    Raises:
        EnvironmentFault: if it is missing here.
        ArtifactError: if the library found is another one.
    """
    if engine.plugin.embedded:
        return None
    library = tensorrt_library.require_plugin()
    if file_digest(library) != engine.plugin.sha256:
        raise ArtifactError(
            f"The engine was built with another build of {engine.plugin.file} than {library}.",
            allowed=f"sha256 {engine.plugin.sha256}, version {engine.plugin.version}",
            fix=REBUILD,
        )
    return library


def check_runnable(engine: TensorRTEngine) -> None:
    """Refuse an engine that this machine cannot run.

    Raises:
        EnvironmentFault: if there is no GPU, its runtime is missing or of another version, or the
            engine is for other GPUs.
        ArtifactError: see `engine_plugin`.
    """
    if not tensorrt_library.gpu_is_usable():
        raise EnvironmentFault(
            f"No NVIDIA GPU with its driver is here, and the engine is one of {engine.target}.",
            fix="run it on a machine with such a GPU, or build with --target onnxruntime",
        )
    module = tensorrt_library.load(engine.target)
    if module.__version__ != engine.version:
        raise EnvironmentFault(
            f"The engine was built by {engine.target} {engine.version}; installed is "
            f"{module.__version__}.",
            allowed=engine.version,
            fix=f"pip install {engine.target}=={engine.version}, or {REBUILD}",
        )
    here = tensorrt_library.compute_capability()
    if engine.compute_capabilities and here not in engine.compute_capabilities:
        raise EnvironmentFault(
            f"This machine's GPU has compute capability {here}.",
            allowed=", ".join(engine.compute_capabilities),
            fix=f"build with --compute-capability {here}",
        )
    engine_plugin(engine)


def why_not_runnable(engine: TensorRTEngine) -> str | None:
    """Say in a sentence why this machine cannot run an engine; None where it can."""
    try:
        check_runnable(engine)
    except (EnvironmentFault, ArtifactError) as fault:
        return fault.problem
    return None
