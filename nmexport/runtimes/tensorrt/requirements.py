"""What a target needs before an engine can be built; asked for before the first stage runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from nmexport.errors import EnvironmentFault, RecipeError
from nmexport.runtimes.tensorrt import library as tensorrt_library

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.runtimes.tensorrt.library import TensorRTTarget

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
    foreign = [one for one in capabilities if one not in tensorrt_library.RTX_CAPABILITIES]
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
