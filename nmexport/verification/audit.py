"""Measures, at run time, the sparsity and the error of every sparsified linear.

The exported model is read without its weights, given counters and outputs next to its nodes, and
run from memory: no node that it had is changed, and no weight is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.graph.cpu import is_bfloat16
from nmexport.progress import busy
from nmexport.report.model import LayerSparsity, Sparsity
from nmexport.runtimes.native import engine_library
from nmexport.runtimes.onnxruntime_opening import (
    EXTERNAL_DATA_FOLDER,
    SESSION_CONFIG,
    provider_here,
)
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.verification.instrument import (
    add_counters,
    add_layer_outputs,
    is_sparse,
    read_graph,
    sparse_linears,
)
from nmexport.verification.placing import open_where_it_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Provider
    from nmexport.store.layers import LayerSpec
    from nmexport.verification.instrument import Counter
    from nmexport.verification.subject import Subject

    Open = Callable[..., OrtSession]

PROTOCOL = (
    "Counted by the runtime inside the shipped model: each sparsified linear's input, less its "
    "shift, goes through the selection op once more, and what is not zero counts as kept; over "
    "prompt and decode tokens of evaluation windows, each where the linear's phase is sparse. "
    "Output error in place is ||y_sparse - y_dense|| / ||y_dense|| of the linear's output, each "
    "model running on its own hidden states over one window, on tokens of the linear's phase; of "
    "the linear alone, the same on the dense model's activations, from calibration."
)

DECODE_STEPS = 4
# Windows whose activations are counted, and tokens of the window that layer outputs are compared
# on: the counts hardly move after the first, and outputs of all layers are many.
_WINDOWS = 2
_ERROR_TOKENS = 128
# What layer outputs of one pass may take together, both models; more layers, more passes.
_OUTPUT_BYTES = 256 << 20


def measure(subject: Subject) -> Sparsity:
    """Count on the engine's device, or on the CPU where that has no room; see `audit`."""
    engine, windows = subject.engine, subject.windows
    counted = windows[:_WINDOWS]

    def open_on(graph: onnx.ModelProto, folder: Path, **options: Any) -> OrtSession:
        return open_where_it_runs(
            lambda provider: open_instrumented(graph, folder, provider=provider, **options),
            provider_here(engine.provider),
            subject.progress,
        )

    with busy(subject.progress, "verify: what each linear keeps and loses"):
        return audit(
            engine.model,
            engine.dense_model,
            subject.folded.layers,
            library=engine_library(engine),
            threads=engine.threads,
            windows=subject.progress.track(counted, label="verify: audit", total=len(counted)),
            error_window=windows[0, :_ERROR_TOKENS],
            open_on=open_on,
        )


def open_instrumented(
    model: onnx.ModelProto,
    folder: Path,
    *,
    library: Path | None,
    threads: int | None,
    provider: Provider = "cpu",
    folds_constants: bool = True,
) -> OrtSession:
    """Open a session on a changed graph whose weights lie in `folder`; see `OrtSession`."""
    config = {**SESSION_CONFIG, EXTERNAL_DATA_FOLDER: str(folder)}
    return OrtSession(
        model.SerializeToString(),
        library=library,
        threads=threads,
        config=config,
        provider=provider,
        bfloat16=is_bfloat16(model),
        folds_constants=folds_constants,
    )


def count_kept(
    session: OrtSession, counters: Sequence[Counter], windows: Iterable[NDArray[np.int64]]
) -> dict[str, tuple[int, int]]:
    """Count (kept, total) elements by layer over windows `[L]`, decoding their last tokens."""
    session.watch(dict.fromkeys(counter.output for counter in counters))
    sums = {counter.layer: (0, 0) for counter in counters}

    def add(new_tokens: int) -> None:
        for counter in counters:
            if counter.counts(new_tokens):
                kept, total = sums[counter.layer]
                kept += int(session.watched[counter.output])
                sums[counter.layer] = kept, total + new_tokens * counter.channels

    for window in windows:
        steps = min(DECODE_STEPS, window.size - 1)
        prompt = window[: window.size - steps]
        session.prefill(prompt[None, :])
        add(prompt.size)
        for token in window[window.size - steps :]:
            session.decode_step(np.array([[token]]))
            add(1)
    return sums


def propagated_errors(
    dense: OrtSession,
    sparse: OrtSession,
    outputs: Mapping[str, str],
    layers: Sequence[LayerSpec],
    window: NDArray[np.int64],
) -> dict[str, float | None]:
    """`||y_sparse - y_dense|| / ||y_dense||` of each layer's output over one window `[L]`.

    Tokens of a layer's phase count; the last ones are decoded where a layer is sparse then alone.
    Memory is bounded: layers are taken in chunks, each chunk runs both models once.
    """
    decodes = any(layer.phase == "decode" for layer in layers)
    prompt = window.size - (min(DECODE_STEPS, window.size - 1) if decodes else 0)
    runs = [window[:prompt], *window[prompt:, None]]
    errors: dict[str, float | None] = {}
    # Dense and sparse, float32.
    for chunk in chunks_by_bytes(layers, lambda layer: 2 * 4 * window.size * layer.out_features):
        names = {layer.name: outputs[layer.name] for layer in chunk}
        phases = {layer.name: layer.phase for layer in chunk}
        exact, made = (_sparse_outputs(session, runs, names, phases) for session in (dense, sparse))
        errors |= {
            layer: relative_error(np.concatenate(made[layer]), np.concatenate(exact[layer]))
            if made[layer]
            else None
            for layer in names
        }
    return errors


def _sparse_outputs(
    session: OrtSession,
    runs: Sequence[NDArray[np.int64]],
    names: Mapping[str, str],
    phases: Mapping[str, str],
) -> dict[str, list[NDArray[Any]]]:
    """Run a prompt and decode steps; return the outputs `[S, O]` of each layer in its phase."""
    session.watch(names.values())
    outputs: dict[str, list[NDArray[Any]]] = {layer: [] for layer in names}
    for place, tokens in enumerate(runs):
        run = session.decode_step if place else session.prefill
        run(tokens[None, :])
        for layer, name in names.items():
            if is_sparse(phases[layer], tokens.size):
                value = session.watched[name]
                outputs[layer].append(value.reshape(-1, value.shape[-1]).copy())
    return outputs


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float | None:
    """Divide the norm of the difference by the reference's; None where that is zero."""
    reference = reference.astype(np.float64)
    norm = float(np.linalg.norm(reference))
    return float(np.linalg.norm(value.astype(np.float64) - reference)) / norm if norm else None


def chunks_by_bytes(
    layers: Sequence[LayerSpec], bytes_of: Callable[[LayerSpec], int]
) -> Iterator[list[LayerSpec]]:
    """Split the layers, in order, by what fits into memory together; at least one each."""
    chunk: list[LayerSpec] = []
    held = 0
    for layer in layers:
        if chunk and held + bytes_of(layer) > _OUTPUT_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(layer)
        held += bytes_of(layer)
    if chunk:
        yield chunk


def audit(
    sparse_path: Path,
    dense_path: Path | None,
    layers: Sequence[LayerSpec],
    *,
    library: Path | None,
    threads: int | None,
    windows: Iterable[NDArray[np.int64]],
    error_window: NDArray[np.int64],
    open_on: Open = open_instrumented,
) -> Sparsity:
    """Run the instrumented models and count; `linears` is left for the caller.

    Args:
        sparse_path: The exported sparse model.
        dense_path: The baseline next to it; None where there is none to compare outputs with.
        layers: The sparsified linears.
        library: Native op library, or None for the function bodies.
        threads: Intra-op threads.
        windows: Token ids `[L]`, L at least 2, to count over; read once, as they are counted.
        error_window: Token ids `[L]` to compare layer outputs over.
        open_on: Opens an instrumented graph, as `open_instrumented` does.
    """
    sparse_graph = read_graph(sparse_path)
    linears = sparse_linears(sparse_graph)
    values = {layer.name: linears[layer.name].output for layer in layers if layer.name in linears}
    counters = add_counters(sparse_graph, layers)
    outputs = add_layer_outputs(sparse_graph, values)
    options: dict[str, object] = {"library": library, "threads": threads}
    with open_on(sparse_graph, sparse_path.parent, **options) as sparse:
        kept = count_kept(sparse, counters, windows)
        if dense_path is None:
            return sparsity(layers, kept, dict.fromkeys(kept))
        dense_graph = read_graph(dense_path)
        add_layer_outputs(dense_graph, values)
        with open_on(dense_graph, dense_path.parent, **options) as dense:
            errors = propagated_errors(dense, sparse, outputs, layers, error_window)
    return sparsity(layers, kept, errors)


def sparsity(
    layers: Sequence[LayerSpec],
    kept: Mapping[str, tuple[int, int]],
    errors: Mapping[str, float | None],
) -> Sparsity:
    """Make the report's figures of counts and errors, without `linears`."""
    rows = []
    for layer in layers:
        count, total = kept[layer.name]
        rows.append(
            LayerSparsity(
                name=layer.name,
                kept=count,
                total=total,
                achieved=1 - count / total if total else None,
                relative_error=errors[layer.name],
                calibrated_error=layer.relative_error,
            )
        )
    kept_in_all = sum(row.kept for row in rows)
    total_of_all = sum(row.total for row in rows)
    return Sparsity(
        sparsified=sum(layer.pattern.n < layer.pattern.m for layer in layers),
        achieved=1 - kept_in_all / total_of_all if total_of_all else None,
        layers=tuple(rows),
        protocol=PROTOCOL,
    )
