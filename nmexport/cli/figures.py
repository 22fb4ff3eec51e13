"""A report as the table a person wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nmexport.cli.output import figure, size, table
from nmexport.report.answer import answer
from nmexport.report.stored_rows import example_rows, words

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

    from nmexport.report.model import Accuracy, Latency, PhaseTimes, Report, StoredDense

Measure = Literal["perplexity", "kl", "top1", "prefill", "decode"]
"""The rows that also have a figure of the dense model in the same integers."""


@dataclass(frozen=True)
class Row:
    """A measurement of both models, and how they compare."""

    name: str
    dense: str
    sparse: str
    comparison: str
    measure: Measure | None = None

    def cells(self, between: Mapping[Measure, str] | None = None) -> tuple[str, ...]:
        """Return the row's cells, with the middle column where there is one."""
        middle = () if between is None else (between[self.measure] if self.measure else "",)
        return (self.name, self.dense, *middle, self.sparse, self.comparison)


def show_report(out: Console, report: Report, work: Path) -> None:
    """Print accuracy, speed and size, dense next to sparse, and the verdict."""
    weights, between = report.weights, report.stored_dense
    if between is None:
        rows = [row.cells() for row in _rows(report)]
        out.print(table(_title(report), ("", "dense", "sparse", ""), rows))
    else:
        sides = (f"dense {weights.dense}", f"dense {weights.sparse}", f"sparse {weights.sparse}")
        rows = [row.cells(_middle(between)) for row in _rows(report)]
        out.print(table(_title(report), ("", *sides, "sparse to dense"), rows))
        # Timed in a run of its own, so that columns of the table are no measure of it.
        out.print(words(report), soft_wrap=True, markup=False)
    _show_examples(out, report)
    sparsity, memory = report.sparsity, report.memory
    out.print(
        f"Sparsity achieved {figure(_percent(sparsity.achieved), 1, ' %')} in "
        f"{sparsity.sparsified} of {sparsity.linears} linears;"
        f" artifact {size(memory.artifact_bytes)};"
        f" peak memory {size(memory.peak_rss_bytes)}",
        soft_wrap=True,
    )
    if report.kept is not None:
        out.print(f"Weights of {report.kept.sentence()}", soft_wrap=True, markup=False)
    for gate in report.gates:
        mark = "pass" if gate.passed else "FAIL"
        out.print(
            f"Gate {gate.name}: {mark} (limit {gate.limit:g}, value {figure(gate.value, 4)})",
            soft_wrap=True,
        )
    out.print(f"Verdict: {report.verdict}", soft_wrap=True)
    out.print(f"In short: {answer(report).headline}", soft_wrap=True, markup=False)
    page = next(
        (work / name for name in ("report.html", "report.md") if (work / name).is_file()),
        work / "report.json",
    )
    out.print(f"Report: {page}", soft_wrap=True, markup=False)


def _show_examples(out: Console, report: Report) -> None:
    """Print what each model writes after the same prompts."""
    for prompt, texts in example_rows(report):
        out.print(f"\n{prompt} ...", soft_wrap=True, markup=False)
        width = max(map(len, texts))
        for side, text in texts.items():
            out.print(f"  {side:<{width}}  {text}", soft_wrap=True, markup=False)
    if report.accuracy.examples:
        out.print()


def _title(report: Report) -> str:
    mitigations = ", ".join(report.mitigations) or "no mitigation"
    return (
        f"{report.model.id}  {report.pattern}  {report.criterion}, "
        f"{mitigations}  on {report.latency.runtime or report.target}"
    )


def _rows(report: Report) -> list[Row]:
    accuracy = report.accuracy
    return [
        Row(
            "perplexity" if accuracy.dataset is None else f"perplexity ({accuracy.dataset})",
            figure(accuracy.dense.perplexity),
            figure(accuracy.sparse.perplexity),
            figure(accuracy.perplexity_ratio, 3, "x"),
            "perplexity",
        ),
        *_decode_only_row(accuracy),
        Row("KL to dense, mean", "", figure(accuracy.kl_mean, 4), "", "kl"),
        Row("top-1 agreement", "", figure(_percent(accuracy.top1_agreement), 1, " %"), "", "top1"),
        *_task_rows(accuracy),
        *_speed_rows(report.latency),
    ]


def _middle(between: StoredDense) -> dict[Measure, str]:
    """Make the column of dense in the sparse model's integers."""
    scores, times = between.scores, between.latency.dense
    return {
        "perplexity": figure(scores.sparse.perplexity),
        "kl": figure(scores.kl_mean, 4),
        "top1": figure(_percent(scores.top1_agreement), 1, " %"),
        "prefill": figure(times.prefill.p50_ms, 1, " ms"),
        "decode": figure(times.decode.p50_ms, 1, " ms"),
    }


def _decode_only_row(accuracy: Accuracy) -> list[Row]:
    """Show perplexity with dense prompts; nothing where it was not measured."""
    decoded = accuracy.decode_only
    if decoded is None or decoded.perplexity_ratio is None:
        return []
    return [
        Row(
            "  sparse in decode only",
            figure(decoded.dense.perplexity),
            figure(decoded.sparse.perplexity),
            figure(decoded.perplexity_ratio, 3, "x"),
        )
    ]


def _task_rows(accuracy: Accuracy) -> list[Row]:
    """Show scores with their standard errors."""
    return [
        Row(
            f"{name}, {task.metric}, {task.n} documents",
            _with_error(task.dense, task.dense_stderr),
            _with_error(task.sparse, task.sparse_stderr),
            _with_error(task.sparse - task.dense, task.difference_stderr),
        )
        for name, task in accuracy.tasks.items()
    ]


def _with_error(value: float, stderr: float | None) -> str:
    return figure(value, 3) if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _speed_rows(latency: Latency) -> list[Row]:
    """Show median milliseconds, dense and sparse, and the speed-up."""
    dense, sparse, speedup = latency.dense, latency.sparse, latency.speedup
    tokens, context = dense.prefill.tokens, dense.decode.context
    prefill = "prefill" if tokens is None else f"prefill, {tokens} tokens"
    decode = "decode" if context is None else f"decode, {context} tokens in the cache"
    return [
        _speed_row("prefill", prefill, dense.prefill, sparse.prefill, speedup.prefill),
        _speed_row("decode", decode, dense.decode, sparse.decode, speedup.decode),
    ]


def _speed_row(
    measure: Measure, name: str, dense: PhaseTimes, sparse: PhaseTimes, speedup: float | None
) -> Row:
    return Row(
        name,
        figure(dense.p50_ms, 1, " ms"),
        figure(sparse.p50_ms, 1, " ms"),
        figure(speedup, 2, "x the speed"),
        measure,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
