"""Stage `engine`: make the exported model ready to run on the target runtime.

For ONNX Runtime that is a choice of options, the native library pinned by its digest, and a check
that the model opens and computes. No optimised copy of the graph is kept: the runtime's own passes
take little of the time that opening takes, and a copy would double the weights on disk.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.artifact import file_digest
from nmexport.errors import ArtifactError, EnvironmentFault

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.recipe import Target
    from nmexport.runtimes.onnxruntime import Engine
    from nmexport.stages.inputs import StageInputs

UPSTREAM = ("export",)
FILENAME = "engine.json"
NO_LIBRARY = "the native op library is not built here; the function bodies in the model run"


@dataclass(frozen=True)
class Artifact:
    """A finished engine."""

    path: Path

    @property
    def engine(self) -> Engine:
        """What to open and how.

        Raises:
            ArtifactError: if `engine.json` is missing or not of this schema.
        """
        from nmexport.runtimes.onnxruntime import read_engine

        return read_engine(self.path)


def resolve_target(target: Target) -> Literal["onnxruntime"]:
    """The runtime that a recipe's target means on this machine.

    Raises:
        EnvironmentFault: if this version cannot build for the target.
    """
    if target in {"auto", "onnxruntime"}:
        return "onnxruntime"
    raise EnvironmentFault(
        f"Target {target} is not available in this version of nmexport.",
        allowed="auto, onnxruntime",
        fix="use --target onnxruntime; the exported ONNX file carries what TensorRT will need",
    )


def key_fields(inputs: StageInputs) -> dict[str, Any]:
    """Everything besides the exported model that decides the engine.

    Raises:
        EnvironmentFault: if this version cannot build for the target.
    """
    return {
        "target": resolve_target(inputs.recipe.target),
        "onnxruntime": inputs.environment.version("onnxruntime"),
        "threads": inputs.recipe.latency.threads,
        "device": inputs.environment.cpu,
        "library": _library_entry(_library()),
    }


def run(inputs: StageInputs) -> dict[str, Any]:
    """Write `engine.json` and check that what it describes opens and computes.

    Raises:
        EnvironmentFault: if the target or its runtime does not work here.
        ArtifactError: if the exported model cannot be opened, or computes no finite logits.
    """
    from nmexport.runtimes.onnxruntime import ENGINE_SCHEMA, SESSION_CONFIG

    library = _library()
    if library is None:
        inputs.progress.note(f"engine: {NO_LIBRARY}")
    document = {
        "schema": ENGINE_SCHEMA,
        "runtime": resolve_target(inputs.recipe.target),
        "runtime_version": inputs.environment.version("onnxruntime"),
        "model": _relative(inputs, "model.onnx"),
        "dense_model": _relative(inputs, "dense/model.onnx"),
        "threads": inputs.recipe.latency.threads,
        "session_config": dict(SESSION_CONFIG),
        "library": _library_entry(library),
        "why_no_library": None if library else NO_LIBRARY,
    }
    text = json.dumps(document, indent=1) + "\n"
    (inputs.output / FILENAME).write_text(text, encoding="utf-8")
    return {
        "target": document["runtime"],
        "library": library.name if library else None,
        "why_no_library": document["why_no_library"],
        "open_seconds": {
            "sparse": _load_check(inputs.output, dense=False),
            "dense": _load_check(inputs.output, dense=True),
        },
    }


def _library() -> Path | None:
    from nmexport.runtimes.native import find_library

    return find_library()


def _library_entry(library: Path | None) -> dict[str, str] | None:
    return {"file": library.name, "sha256": file_digest(library)} if library else None


def _relative(inputs: StageInputs, name: str) -> str:
    """A file of the export, seen from the finished artifact, which lies where `output` does."""
    path = inputs.upstream["export"].resolve() / name
    relative = os.path.relpath(path, inputs.output.resolve())
    return relative.replace(os.sep, "/")


def _load_check(folder: Path, *, dense: bool) -> float:
    """Open a model, run one token, and return the seconds that opening took."""
    import numpy as np

    from nmexport.runtimes.onnxruntime import OrtSession

    began = time.monotonic()
    with OrtSession.from_engine(folder, dense=dense) as session:
        opened = time.monotonic()
        logits = session.prefill(np.zeros((1, 1), np.int64))
    if not np.isfinite(logits).all():
        raise ArtifactError(
            f"The {'dense' if dense else 'sparse'} model computes logits that are not finite.",
            fix="check the weights; with --dtype float16 try float32",
        )
    return round(opened - began, 3)
