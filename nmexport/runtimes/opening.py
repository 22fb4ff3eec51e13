"""The one place that turns `engine.json` into a session, whatever runtime it names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.tensorrt.requirements import why_not_runnable
from nmexport.runtimes.tensorrt_session import TensorRTSession

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.runtimes.engine import Side
    from nmexport.runtimes.session import Session
    from nmexport.runtimes.slots import SlotRoom


def open_session(engine: Path, *, side: Side = "sparse", elsewhere: bool = False) -> Session:
    """Open a built engine, or another model next to it.

    Args:
        engine: `engine.json`, or the folder that holds it.
        side: Which model; the dense one in integers runs on ONNX Runtime whatever the target.
        elsewhere: Where this machine cannot run the engine, open the ONNX file that it was built
            from on ONNX Runtime; `why_not_here` says why, and the session's `runtime` what it is.

    Raises:
        ArtifactError: if the engine cannot be read or opened.
        EnvironmentFault: if this machine cannot run it.
    """
    has_plan = read_engine(engine).tensorrt is not None
    if has_plan and side != "stored" and not (elsewhere and why_not_here(engine)):
        return TensorRTSession.from_engine(engine, side=side)
    return open_on_onnxruntime(engine, side=side)


def open_on_onnxruntime(engine: Path, *, side: Side = "sparse", elsewhere: bool = False) -> Session:
    """Open a built engine's ONNX files on ONNX Runtime, by the faster graphs made for it if any.

    Args:
        engine: `engine.json`, or the folder that holds it.
        side: Which model.
        elsewhere: Compute on the CPU where this ONNX Runtime has no CUDA provider.

    Raises:
        ArtifactError: if the engine cannot be read or opened.
        EnvironmentFault: if this machine cannot run it.
    """
    from nmexport.runtimes.cuda_session import CudaSession
    from nmexport.runtimes.onnxruntime_opening import provider_here
    from nmexport.runtimes.onnxruntime_session import OrtSession
    from nmexport.runtimes.step_session import StepSession

    description = read_engine(engine)
    if description.exported(side) is None:
        raise _lacks(engine, side)
    provider = provider_here(description.provider) if elsewhere else description.provider
    if provider == "cuda" and description.cuda is not None:
        return CudaSession.from_engine(engine, side=side)
    if provider == "cpu" and description.shared_step is not None:
        return StepSession.from_engine(engine, side=side)
    return OrtSession.from_engine(engine, side=side, elsewhere=elsewhere)


def open_for_serving(
    engine: Path, room: SlotRoom, *, side: Side = "sparse", elsewhere: bool = False
) -> Session:
    """Open a built engine's ONNX files on ONNX Runtime, for many sequences at a time.

    Args:
        engine: `engine.json`, or the folder that holds it.
        room: Slots of a session that has a fixed number of them; other sessions take any number of
            sequences of any length.
        side: Which model.
        elsewhere: Compute on the CPU where this ONNX Runtime has no CUDA provider.

    Raises:
        ArtifactError: if the engine cannot be read or opened.
        EnvironmentFault: if this machine cannot run it.
        RequestError: if the slots do not fit into the device's memory.
    """
    from nmexport.runtimes.onnxruntime_opening import provider_here
    from nmexport.runtimes.slot_session import SlotSession

    description = read_engine(engine)
    if description.exported(side) is None:
        raise _lacks(engine, side)
    provider = provider_here(description.provider) if elsewhere else description.provider
    if provider == "cuda" and description.cuda is not None:
        return SlotSession.from_engine(engine, room, side=side)
    return open_on_onnxruntime(engine, side=side, elsewhere=elsewhere)


def _lacks(engine: Path, side: Side) -> ArtifactError:
    """Build the error for a model that an engine lacks."""
    if side == "stored":
        return ArtifactError(
            f"{engine} has no dense model in integers.",
            fix="build it again with --weights int8 and without --no-dense-baseline",
        )
    return ArtifactError(
        f"{engine} has no {side} model.", fix="build it again without --no-dense-baseline"
    )


def why_not_here(engine: Path) -> str | None:
    """Say in a sentence why this machine cannot run an engine; None where it can.

    Raises:
        ArtifactError: if `engine.json` cannot be read.
    """
    described = read_engine(engine).tensorrt
    return None if described is None else why_not_runnable(described)
