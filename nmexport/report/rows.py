"""Rows and lines of the report's tables, as people read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.report import allocation_rows
from nmexport.report.figures import (
    ABSENT,
    count,
    milliseconds,
    number,
    percent,
    rate,
    size,
    speedup,
    times,
)

if TYPE_CHECKING:
    from nmexport.report.model import (
        CacheError,
        CacheParity,
        DenseParity,
        Latency,
        LinearParity,
        Parity,
        ParityLeg,
        PhaseTimes,
        Report,
    )

_DENSE = "dense torch, dense ONNX"
_NOISE = "Noise floor: PyTorch against itself, embeddings off by 1e-7"


def compared(words: str, value: float | None) -> str:
    """Say a ratio in words; nothing where there is no ratio."""
    return "" if value is None else words


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """A row of the table that is read first."""

    what: str
    dense: str
    dense_more: str = ""
    sparse: str
    sparse_more: str = ""
    change: str = ""
    change_more: str = ""


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """Two whole models, compared; `why` they could not be, otherwise."""

    pair: str
    max_abs: str
    median_abs: str = ""
    top1: str = ""
    greedy: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class LinearRow:
    """One executor's linears against the oracle."""

    executor: str
    share: str
    values: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """Both models' scores of a task, the difference, and their standard errors."""

    task: str
    metric: str
    n: str
    dense: str
    dense_error: str
    sparse: str
    sparse_error: str
    difference: str
    difference_error: str


def method(report: Report) -> str:
    """Name the method in one line."""
    parts = [f"{report.grouping} groups"]
    if report.allocation is None:
        parts = [str(report.pattern), str(report.criterion).upper(), *parts]
    else:
        parts = [allocation_rows.chosen_mix(report.allocation), *parts]
    parts.append(" + ".join(report.mitigations) or "no mitigation")
    weights = report.weights
    if weights.dense != weights.sparse:
        parts.append(f"{weights.sparse} weights against dense {weights.dense}")
    if report.phases == "mixed":
        parts.append("phases by linear")
    elif report.phases != "all":
        parts.append(f"{report.phases} only")
    return ", ".join(parts)


def summary_rows(report: Report) -> list[SummaryRow]:
    """Lay out the table that is read first: what, dense, sparse, and the two compared."""
    accuracy, memory = report.accuracy, report.memory
    return [
        SummaryRow(
            what="Perplexity",
            dense=number(accuracy.dense.perplexity),
            sparse=number(accuracy.sparse.perplexity),
            change=times(accuracy.perplexity_ratio),
            change_more=compared("as high", accuracy.perplexity_ratio),
        ),
        _decode_row(report.latency),
        _prefill_row(report.latency),
        SummaryRow(
            what="Peak memory",
            dense=size(memory.dense.peak_rss_bytes),
            sparse=size(memory.sparse.peak_rss_bytes),
        ),
    ]


def _decode_row(latency: Latency) -> SummaryRow:
    dense = latency.dense.decode
    what = f"Decode, batch {dense.batch}, {dense.context} tokens cached"
    return _speed_row(what, dense, latency.sparse.decode, latency.speedup.decode)


def _prefill_row(latency: Latency) -> SummaryRow:
    dense = latency.dense.prefill
    what = f"Prefill, {dense.tokens} tokens"
    return _speed_row(what, dense, latency.sparse.prefill, latency.speedup.prefill)


def _speed_row(what: str, dense: PhaseTimes, sparse: PhaseTimes, ratio: float | None) -> SummaryRow:
    return SummaryRow(
        what=what,
        dense=milliseconds(dense.p50_ms),
        dense_more=rate(dense.tokens_per_s),
        sparse=milliseconds(sparse.p50_ms),
        sparse_more=rate(sparse.tokens_per_s),
        change=speedup(ratio),
        change_more=compared("as fast", ratio),
    )


def parity_rows(parity: Parity) -> list[ParityRow]:
    """Lay out one row for each leg."""
    rows = [
        *_dense_rows(parity.dense),
        _parity_row("PyTorch and ONNX function bodies", parity.torch_onnx),
        _parity_row("PyTorch and native op", parity.torch_engine),
        _parity_row("ONNX function bodies and native op", parity.onnx_engine),
    ]
    floor = parity.noise_floor
    return rows if floor is None else [*rows, _parity_row(_NOISE, floor)]


def linear_rows(parity: Parity) -> list[LinearRow]:
    """Lay out one row for each executor whose linears were held against the oracle."""
    linears = parity.linears
    return [
        _linear_row("PyTorch", linears.torch),
        _linear_row("ONNX function bodies", linears.onnx),
        _linear_row("Native op", linears.engine),
    ]


def _linear_row(executor: str, figures: LinearParity) -> LinearRow:
    if figures.within_contract is None:
        return LinearRow(executor=executor, share=ABSENT, why=figures.why or "")
    return LinearRow(
        executor=executor,
        share=percent(figures.error_over_tolerance),
        values=f"{count(figures.values or 0)}, {figures.linears} linears",
    )


def _dense_rows(dense: DenseParity | None) -> list[ParityRow]:
    """Lay out the dense file against torch, which is compared by relative difference."""
    if dense is None:
        return []
    if dense.error is None:
        return [ParityRow(pair=_DENSE, max_abs=ABSENT, why=dense.why or "")]
    return [
        ParityRow(
            pair=_DENSE,
            max_abs=f"{dense.error:.1e} of its size",
            greedy=f"{dense.outputs} outputs, at most {dense.tolerance:g} allowed",
        )
    ]


def _parity_row(pair: str, leg: ParityLeg) -> ParityRow:
    if leg.max_abs is None:
        return ParityRow(pair=pair, max_abs=ABSENT, why=leg.why or "")
    return ParityRow(
        pair=pair,
        max_abs=number(leg.max_abs, 2),
        median_abs=number(leg.median_abs, 2),
        top1=percent(leg.top1_agreement, 2),
        greedy=f"identical, {leg.prompts} prompts"
        if leg.greedy_identical
        else f"{leg.prompts_diverged} of {leg.prompts} prompts differ",
    )


def task_rows(report: Report) -> list[TaskRow]:
    """Lay out one row for each task."""
    return [
        TaskRow(
            task=name,
            metric=task.metric,
            n=count(task.n),
            dense=number(task.dense),
            dense_error=_error(task.dense_stderr),
            sparse=number(task.sparse),
            sparse_error=_error(task.sparse_stderr),
            difference=number(task.sparse - task.dense),
            difference_error=_error(task.difference_stderr),
        )
        for name, task in report.accuracy.tasks.items()
    ]


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f"± {number(stderr, 2)}"


def decode_only_line(report: Report) -> str | None:
    """Compare decode-only sparsity with sparsity in all phases; None where not asked for."""
    decoded, whole = report.accuracy.decode_only, report.accuracy.second_half
    if decoded is None:
        return None
    if decoded.perplexity_ratio is None:
        return f"{ABSENT}: {decoded.why}"
    beside = "" if whole is None else f"; in all phases {number(whole.perplexity_ratio)}"
    return (
        f"perplexity ratio {number(decoded.perplexity_ratio)}, mean KL "
        f"{number(decoded.kl_mean)} nats{beside} (the second half of each window, "
        f"{count(decoded.tokens or 0)} tokens)"
    )


def cache_line(caches: CacheParity | None) -> str | None:
    """Say how the caches compare; None for a report that does not compare them."""
    if caches is None:
        return None
    if not caches.layers or caches.tolerance is None:
        return f"not compared: {caches.why}"
    allowed = f"{100 * caches.tolerance:.3g} %"
    if caches.first_diverging is not None:
        first = _diverging(caches.first_diverging)
        return f"the first to differ by more than {allowed} is {first}"
    worst = max(caches.layers, key=lambda layer: layer.relative_error or 0.0)
    return f"all layers agree within {allowed}; the largest difference is {_diverging(worst)}"


def _diverging(layer: CacheError) -> str:
    error = layer.relative_error
    by = "whose values are no numbers" if error is None else f"by {100 * error:.2g} %"
    return f"layer {layer.layer}'s {layer.tensor}, {by}"


def host_lines(latency: Latency) -> list[str]:
    """Say how a decode step's time is shared between GPU and host; nothing where no GPU ran."""
    sides = (("dense", latency.dense.decode), ("sparse", latency.sparse.decode))
    return [
        f"Decode, {side}: {milliseconds(times.device_ms)} on the GPU, "
        f"{number(times.host_us, 2)} us beyond it on the host."
        for side, times in sides
        if times.device_ms is not None
    ]
