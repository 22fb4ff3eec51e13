"""Stage `engine`: make the exported model ready to run on the target runtime.

For ONNX Runtime that is a choice of options, the native library pinned by its digest, and a check
that the model opens and computes. For its CUDA provider, and for steps of many sequences on a CPU,
graphs of their own are written, without weights: see `graph.cuda` and `graph.shared_step`. For
TensorRT it is a plan of the sparse model and one of the dense model; `engine.json` describes the
ONNX files in both cases, as they run wherever the plan does not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError, EnvironmentFault, RecipeError
from nmexport.runtimes import native
from nmexport.runtimes.engine import (
    SCHEMA,
    Engine,
    LibraryRecord,
    read_engine,
    write_engine,
)
from nmexport.runtimes.opening import open_on_onnxruntime
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt import requirements
from nmexport.runtimes.tensorrt.profiles import limits_from
from nmexport.store.artifact import file_digest
from nmexport.store.exported import DENSE, MODEL, stored_model

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.choices import Target
    from nmexport.runtimes.engine import Runtime, Side, TensorRTTarget
    from nmexport.stages.inputs import StageInputs

UPSTREAM = ("export",)
NO_LIBRARY = "the native op library is not built here; the function bodies in the model run"


@dataclass(frozen=True)
class Artifact:
    """A finished engine."""

    path: Path

    @property
    def engine(self) -> Engine:
        """The engine's description.

        Raises:
            ArtifactError: if `engine.json` is missing or not of this schema.
        """
        return read_engine(self.path)


def resolve_target(target: Target) -> Runtime:
    """The runtime that a recipe's target means on this machine.

    `auto` is TensorRT where its package, a GPU and the plugin library are here, TensorRT-RTX where
    those of its own are, and ONNX Runtime elsewhere.
    """
    if target != "auto":
        return target
    if tensorrt_library.find_plugin() is None or not tensorrt_library.gpu_is_usable():
        return "onnxruntime"
    return next((target for target in tensorrt_library.TARGETS if _loads(target)), "onnxruntime")


def _loads(target: TensorRTTarget) -> bool:
    try:
        tensorrt_library.load(target)
    except EnvironmentFault:
        return False
    here = tensorrt_library.compute_capability()
    return target == "tensorrt" or here in tensorrt_library.RTX_CAPABILITIES


def key_fields(inputs: StageInputs) -> dict[str, object]:
    """Everything other than the exported model that decides the engine.

    What a TensorRT engine needs is asked for here, as this is called before the first stage runs:
    hours of calibration later is late to hear that a package is missing.

    Raises:
        RecipeError: if the target needs the dense baseline, which the recipe leaves out, or does
            not build for the recipe's GPUs.
        EnvironmentFault: see `engines.requirements.check`.
    """
    target = resolve_target(inputs.recipe.target)
    if target != "onnxruntime" and not inputs.recipe.model.dense_baseline:
        raise RecipeError(
            f"Target {target} builds a dense engine too, and there is no dense baseline.",
            fix="leave out --no-dense-baseline, or use --target onnxruntime",
        )
    fields = {
        "schema": SCHEMA,
        "target": target,
        "onnxruntime": inputs.environment.version("onnxruntime"),
        "threads": inputs.recipe.latency.threads,
        "device": inputs.environment.cpu,
        "library": _library_fields(native.find_library()),
    }
    if target == "onnxruntime":
        return {**fields, "gpus": [gpu.name for gpu in inputs.environment.gpus]}

    requirements.check(target, inputs.recipe.engine.compute_capabilities)
    return {
        **fields,
        target: inputs.environment.version(target),
        "gpus": [gpu.name for gpu in inputs.environment.gpus],
        "engine": inputs.recipe.engine.model_dump(mode="json"),
        "limits": vars(limits_from(inputs.recipe)),
        "plugin": _library_fields(tensorrt_library.find_plugin()),
    }


def run(inputs: StageInputs) -> dict[str, object]:
    """Write `engine.json` and what it describes, and check that it opens and computes.

    Raises:
        EnvironmentFault: if the target, its runtime or its native library does not work here.
        ArtifactError: if the exported model cannot be opened, computes no finite logits, or is
            refused by TensorRT.
        InternalError: if a TensorRT engine is not what was asked for.
    """
    target = resolve_target(inputs.recipe.target)
    if target == "onnxruntime":
        return _run_onnxruntime(inputs)
    return _run_tensorrt(inputs, target)


def _run_tensorrt(inputs: StageInputs, target: TensorRTTarget) -> dict[str, object]:
    from nmexport.runtimes.tensorrt.pair import LOG, build_pair

    built = build_pair(
        target=target,
        recipe=inputs.recipe,
        environment=inputs.environment,
        export=inputs.upstream["export"],
        output=inputs.output,
        log=(inputs.resume or inputs.output) / LOG,  # a failed build's folder is removed
        progress=inputs.progress,
    )
    engine = replace(
        _describe(inputs, native.find_library()),
        runtime=target,
        runtime_version=built.engine.version,
        tensorrt=built.engine,
        build=built.record,
    )
    write_engine(engine, inputs.output)
    return built.metrics


def _run_onnxruntime(inputs: StageInputs) -> dict[str, object]:
    library = native.find_library()
    if library is None:
        inputs.progress.note(f"engine: {NO_LIBRARY}")
    engine = _describe(inputs, library)
    write_engine(engine, inputs.output)
    return {
        "target": engine.runtime,
        "library": library.name if library else None,
        "why_no_library": engine.why_no_library,
        "open_seconds": {
            "sparse": _load_check(inputs.output, "sparse"),
            "dense": _load_check(inputs.output, "dense") if engine.dense_model else None,
        },
    }


def _describe(inputs: StageInputs, library: Path | None) -> Engine:
    """Describe how the exported files run on ONNX Runtime."""
    from nmexport.runtimes.onnxruntime_opening import SESSION_CONFIG, choose_provider
    from nmexport.stages import rewriting

    export = inputs.upstream["export"].resolve()
    model = inputs.recipe.model
    provider = choose_provider(library)
    cuda, why_no_cuda = None, None
    step, why_no_step = None, None
    if provider == "cuda":
        rewriting.check_activations(export / MODEL)
        cuda, why_no_cuda = rewriting.write_cuda_graphs(inputs)
    elif library is None:
        why_no_step = NO_LIBRARY
    else:
        step, why_no_step = rewriting.write_step_graphs(inputs)
    return Engine(
        runtime="onnxruntime",
        runtime_version=inputs.environment.version("onnxruntime"),
        model=export / MODEL,
        dense_model=export / DENSE / MODEL if model.dense_baseline else None,
        stored_model=stored_model(export),
        element_type=model.dtype,
        threads=inputs.recipe.latency.threads,
        provider=provider,
        cuda=cuda,
        why_no_cuda=why_no_cuda,
        shared_step=step,
        why_no_shared_step=why_no_step,
        session_config=SESSION_CONFIG,
        library=_library_record(inputs.output.resolve(), library) if library else None,
        why_no_library=None if library else NO_LIBRARY,
    )


def _library_record(output: Path, library: Path) -> LibraryRecord:
    return LibraryRecord(file=output / library.name, sha256=file_digest(library))


def _library_fields(library: Path | None) -> dict[str, str] | None:
    return {"file": library.name, "sha256": file_digest(library)} if library else None


def _load_check(folder: Path, side: Side) -> float:
    """Open a model, run one token, and return the seconds that opening took."""
    import numpy as np

    began = time.monotonic()
    with open_on_onnxruntime(folder, side=side) as session:
        opened = time.monotonic()
        logits = session.prefill(np.zeros((1, 1), np.int64))
    if not np.isfinite(logits).all():
        raise ArtifactError(
            f"The {side} model computes logits that are not finite.",
            fix="check the weights; with --dtype float16 try float32",
        )
    return round(opened - began, 3)
