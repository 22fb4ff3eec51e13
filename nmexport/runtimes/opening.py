"""The one place that turns `engine.json` into a session, whatever runtime it names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError
from nmexport.runtimes.tensorrt.library import TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.runtimes.session import Timed

_REBUILD = "run `nmexport engine` (or `nmexport build`) on this work directory again"


def open_session(engine: Path, *, dense: bool = False, elsewhere: bool = False) -> Timed:
    """Open a built engine, or the dense baseline beside it.

    Args:
        engine: `engine.json`, or the folder that holds it.
        dense: Open the baseline.
        elsewhere: Where this machine cannot run the engine, open the ONNX file that it was built
            from on ONNX Runtime; `why_not_here` says why, and the session's `runtime` what it is.

    Raises:
        ArtifactError: if the engine cannot be read or opened.
        EnvironmentFault: if this machine cannot run it.
    """
    if runtime_of(engine) in TARGETS and not (elsewhere and why_not_here(engine)):
        from nmexport.runtimes.tensorrt_session import TensorRTSession

        return TensorRTSession.from_engine(engine, dense=dense)
    from nmexport.runtimes.onnxruntime_session import OrtSession

    return OrtSession.from_engine(engine, dense=dense)


def runtime_of(engine: Path) -> str:
    """What an engine runs on, as `engine.json` names it.

    Raises:
        ArtifactError: if it cannot be read.
    """
    path = engine if engine.suffix == ".json" else engine / "engine.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["runtime"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}", fix=_REBUILD) from error


def why_not_here(engine: Path) -> str | None:
    """Why this machine cannot run an engine, in a sentence; None where it can.

    Raises:
        ArtifactError: if `engine.json` cannot be read.
    """
    if runtime_of(engine) not in TARGETS:
        return None
    from nmexport.runtimes.tensorrt.description import why_not_runnable

    return why_not_runnable(engine)
