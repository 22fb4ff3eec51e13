"""The report's comparison of dense in floats, dense in integers and sparse in integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.report.figures import milliseconds, number, size, speedup

if TYPE_CHECKING:
    from nmexport.report.model import Report


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """One of the three models that weights in integers are compared by."""

    model: str
    perplexity: str
    kl: str
    decode: str
    prefill: str
    size: str


def rows(report: Report) -> list[StoredRow]:
    """Lay out dense in floats, dense and sparse in integers; none without the second."""
    between = report.stored_dense
    if between is None:
        return []
    accuracy, weights = report.accuracy, report.weights
    sides = (
        (f"dense {weights.dense}", accuracy.dense, 0.0, report.latency.dense, between.dense_bytes),
        (
            f"dense {weights.sparse}",
            between.scores.sparse,
            between.scores.kl_mean,
            between.latency.dense,
            between.stored_bytes,
        ),
        (
            f"{report.pattern} {weights.sparse}",
            accuracy.sparse,
            accuracy.kl_mean,
            between.latency.sparse,
            between.sparse_bytes,
        ),
    )
    return [
        StoredRow(
            model=model,
            perplexity=number(likelihood.perplexity, 4),
            kl=number(kl, 3),
            decode=milliseconds(timed.decode.p50_ms),
            prefill=milliseconds(timed.prefill.p50_ms),
            size=size(files),
        )
        for model, likelihood, kl, timed, files in sides
    ]


def example_rows(report: Report) -> list[tuple[str, dict[str, str]]]:
    """Lay out what each model writes: each prompt, and texts by the name of the model."""
    weights, between = report.weights, report.stored_dense
    rows = []
    for example in report.accuracy.examples:
        texts = {
            f"dense {weights.dense}": example.dense,
            f"dense {weights.sparse}": None
            if between is None
            else between.texts.get(example.prompt),
            f"sparse {weights.sparse}": example.sparse,
        }
        rows.append(
            (
                example.prompt,
                {side: _line(text) for side, text in texts.items() if text is not None},
            )
        )
    return rows


def _line(text: str) -> str:
    """Put a text on one line."""
    return " ".join(text.split())


def words(report: Report) -> str | None:
    """Say how fast the sparse model is next to dense in the same integers."""
    between = report.stored_dense
    if between is None:
        return None
    gain = between.latency.speedup
    return (
        f"In the same integers the sparse model decodes {speedup(gain.decode)} and reads prompts "
        f"{speedup(gain.prefill)} as fast as the dense one."
    )
