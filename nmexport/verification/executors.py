"""Compares a build's executors: torch, the function bodies, and the engine."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nmexport.environment import free_memory
from nmexport.errors import UserError
from nmexport.progress import busy
from nmexport.report.model import CacheParity, LinearParity, LinearsParity
from nmexport.runtimes.native import engine_library
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.opening import open_session, why_not_here
from nmexport.verification import cache_parity, op_parity, parity
from nmexport.verification.audit import open_instrumented
from nmexport.verification.extent import extent_of
from nmexport.verification.memory import artifact_bytes
from nmexport.verification.placing import check_session, parity_device
from nmexport.verification.reference import DeviceProducts, array_from, open_folded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from nmexport.report.model import Parity
    from nmexport.runtimes.engine import Engine, Provider
    from nmexport.runtimes.session import Session
    from nmexport.verification.extent import Extent
    from nmexport.verification.reference import TorchSession
    from nmexport.verification.subject import Subject

_NO_NUMPY_TYPE = "ONNX Runtime hands out no cache in bfloat16 from a GPU"
_NO_INNER_VALUES = "a TensorRT engine returns nothing but logits and cache"
# Memory of parity, as a multiple of the artifact's size. Torch's weights and those that two
# sessions map and repack; a session without the native library, which in narrow types holds all
# weights once more, as float32.
_PARITY_MEMORY = {"float32": 4, "float16": 5, "bfloat16": 5}
_BODIES_MEMORY = {"float32": 2, "float16": 4, "bfloat16": 4}


def compare(subject: Subject) -> Parity:
    """Compare whole models in lock step, and each linear with the oracle.

    Executors that do not fit into memory, or do not run here, are left out with the reason.

    Raises:
        ArtifactError: if an artifact cannot be read.
        ModelError: if the torch model cannot be loaded.
    """
    engine, progress = subject.engine, subject.progress
    dtype = subject.recipe.model.dtype
    device = parity_device(engine)
    extent = _extent(subject, device)
    progress.note(f"verify: parity: {extent.words()}")
    why = {} if device == "cuda" else too_large(engine, dtype)
    with contextlib.ExitStack() as stack:
        executors: dict[str, Session] = {}
        torch_session = None
        if parity.TORCH not in why:
            with busy(progress, "verify: parity: open the torch model"):
                torch_session = stack.enter_context(
                    open_folded(subject.source, subject.recipe.model, subject.folded, device=device)
                )
            executors[parity.TORCH] = torch_session.with_twins()
        if parity.ONNX not in why:
            with busy(progress, "verify: parity: open the model without its native op"):
                try:
                    bodies = stack.enter_context(
                        check_session(_open_bodies(engine, device), device)
                    )
                except UserError as error:
                    if device == "cpu":
                        raise
                    why[parity.ONNX] = error.problem
                else:
                    executors[parity.ONNX] = bodies
        absent = why_not_here(subject.engine_folder) or no_library(engine)
        if absent:
            why[parity.ENGINE] = absent
        else:
            with busy(progress, "verify: parity: open the engine"):
                executors[parity.ENGINE] = stack.enter_context(open_session(subject.engine_folder))
        steps = range(extent.steps)
        tracked = progress.track(steps, label="verify: parity: tokens", total=len(steps))
        with busy(progress, "verify: parity"):  # the prompts themselves are no step
            report = parity.compare(
                executors,
                subject.prompts[: extent.prompts],
                tracked,
                why_absent=why,
                twins=parity.TORCH in executors,
            )
        with busy(progress, "verify: parity: caches"):
            caches = (
                CacheParity(why=_NO_NUMPY_TYPE)
                if (device, dtype) == ("cuda", "bfloat16")
                else cache_parity.compare_where_possible(
                    executors, (parity.ONNX, parity.ENGINE), why, dtype=dtype
                )
            )
        for name in (parity.ONNX, parity.ENGINE):  # their weights make room for instrumented ones
            if name in executors:
                executors[name].close()
        with busy(progress, "verify: parity: each linear against the oracle"):
            linears = _compare_linears(subject, torch_session, why, extent)
        return replace(report, caches=caches, linears=linears, extent=extent.words())


def _extent(subject: Subject, device: Provider) -> Extent:
    prompts, length = subject.prompts.shape
    return extent_of(
        subject.folded.linears,
        device=device,
        prompts=prompts,
        prompt_tokens=length,
        steps=subject.recipe.evaluation.generate_tokens,
    )


def _open_bodies(engine: Engine, device: Provider) -> OrtSession:
    """Open the exported file without the native op, so that its function bodies run."""
    return OrtSession(
        engine.model,
        threads=engine.threads,
        config=engine.session_config,
        provider=device,
        bfloat16=engine.needs_rewrite(device),
        # Widened to float32, the weights of all bodies would lie on the host first.
        folds_constants=device == "cpu",
    )


def _compare_linears(
    subject: Subject,
    torch_session: TorchSession | None,
    why: Mapping[str, str],
    extent: Extent,
) -> LinearsParity:
    """Compare each executor's linears with the oracle, on the first prompt."""
    engine, folded = subject.engine, subject.folded
    graph, outputs = op_parity.instrument(engine.model)
    libraries: dict[str, Path | None] = {} if parity.ONNX in why else {parity.ONNX: None}
    if engine.runtime != "onnxruntime":
        why = {**why, parity.ENGINE: why.get(parity.ENGINE, _NO_INNER_VALUES)}
    elif parity.ENGINE not in why:
        libraries[parity.ENGINE] = engine_library(engine)

    def tensors_of(name: str) -> dict[str, NDArray[Any]]:
        return {kind: array_from(value) for kind, value in folded.tensors(name).items()}

    figures = {name: LinearParity(why=reason) for name, reason in why.items()}
    for name, library in libraries.items():
        executor = torch_session.linear if torch_session and name == parity.ONNX else None
        try:
            session = _open_watched(subject, graph, library, extent.device)
        except UserError as error:
            if extent.device == "cpu":
                raise
            figures[name] = LinearParity(why=error.problem)
            continue
        with session:
            figures[name], other = op_parity.check(
                session,
                extent.linears,
                outputs,
                tensors_of,
                subject.prompts[0],
                executor=executor,
                products=None if extent.device == "cpu" else DeviceProducts(extent.device),
            )
        if other is not None:
            figures[parity.TORCH] = other
    unknown = LinearParity()
    return LinearsParity(
        torch=figures.get(parity.TORCH, unknown),
        onnx=figures.get(parity.ONNX, unknown),
        engine=figures.get(parity.ENGINE, unknown),
        protocol=op_parity.PROTOCOL,
    )


def _open_watched(
    subject: Subject, graph: onnx.ModelProto, library: Path | None, device: Provider
) -> OrtSession:
    """Open a session that returns inputs and outputs of its linears.

    Without a library the function bodies run.
    """
    engine = subject.engine
    session = open_instrumented(
        graph,
        engine.model.parent,
        library=library,
        threads=engine.threads,
        provider=device,
        folds_constants=device == "cpu",
    )
    return check_session(session, device)


def no_library(engine: Engine) -> str | None:
    """Say why an ONNX Runtime engine is no executor of its own; None where it is one."""
    return engine.why_no_library if engine.runtime == "onnxruntime" else None


def too_large(engine: Engine, dtype: str) -> dict[str, str]:
    """Say, by name, why executors do not fit into memory: torch is left out first."""
    size, free = artifact_bytes(engine.model.parent), free_memory()
    return {
        name: f"{what} would take about {copies[dtype] * size / 1e9:.0f} GB of memory, and "
        f"{free / 1e9:.0f} GB are free"
        for name, what, copies in (
            (parity.TORCH, "three copies of the model", _PARITY_MEMORY),
            (parity.ONNX, "the model without its native op", _BODIES_MEMORY),
        )
        if copies[dtype] * size > free
    }
