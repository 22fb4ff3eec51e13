"""Benchmark tasks through lm-evaluation-harness, dense next to sparse, on the built artifact.

The harness is an optional package.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nmexport.report.model import MetricScore, TaskScore
from nmexport.verification.suite import harness_version, opened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Limits, Session
    from nmexport.store.layers import ModelPhases
    from nmexport.verification.suite import Suite

PROTOCOL = (
    "lm-evaluation-harness {version} asks both models the same requests; dense and sparse answers "
    "come from the shipped model files. A score is the task's first metric. Standard errors are "
    "over documents; that of the difference is paired, document by document."
)
_STEPWISE = (
    " The model's phases differ, so contexts run as prompts and continuations token by token."
)
_CUT = (
    " The engine holds {window} tokens, fewer than the model's {model}: for both models, longer "
    "texts are cut to them, from the left or into pieces."
)
# Bootstrap draws of the standard errors that have no formula; the harness's default takes minutes.
_BOOTSTRAP = 1000
_WINDOW_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
_DEFAULT_WINDOW = 2048
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class TextSide:
    """A model's tokenizer, and how many tokens fit into its window."""

    tokenizer: Any
    max_length: int

    def within(self, limits: Limits) -> TextSide:
        """Limit the window to a session's."""
        return replace(self, max_length=min(self.max_length, limits.tokens or self.max_length))


def compare(
    dense: Session,
    sparse: Session,
    text: TextSide,
    suite: Suite,
    *,
    phases: ModelPhases = "all",
    seed: int = 0,
    progress: Progress,
) -> dict[str, TaskScore]:
    """Score both models on every task.

    Args:
        dense: The baseline.
        sparse: The model that was built.
        text: Tokenizer and window of both.
        suite: Which tasks.
        phases: When the sparse model is sparse; where that is not always, it is scored token by
            token.
        seed: Of few-shot examples and draws.
        progress: Counts requests.

    Returns:
        Scores by task.

    Raises:
        EnvironmentFault: if the harness is not installed, or a task's data cannot be reached.
        RecipeError: if a task is not known.
    """
    harness_version()
    text = _window(text, dense, sparse)
    sides = {}
    for side, session in (("dense", dense), ("sparse", sparse)):
        stepwise = side == "sparse" and phases != "all"
        sides[side] = _results(
            session, text, suite, stepwise=stepwise, seed=seed, progress=progress, side=side
        )
    return {name: _figures(sides["dense"][name], sides["sparse"][name]) for name in sides["dense"]}


def protocol(phases: ModelPhases, text: TextSide, *sessions: Session) -> str:
    """Describe how `compare` measures.

    Args:
        phases: When the sparse model is sparse.
        text: The model's window.
        sessions: What was scored.
    """
    words = PROTOCOL.format(version=harness_version()) + ("" if phases == "all" else _STEPWISE)
    window = _window(text, *sessions).max_length
    cut = _CUT.format(window=window, model=text.max_length) if window < text.max_length else ""
    return words + cut


def text_side(tokenizer: Any, config: Mapping[str, Any]) -> TextSide:
    """Read a model's tokenizer and window from its `config.json`, as the harness does."""
    inner = config.get("text_config") or config
    known = [inner[key] for key in _WINDOW_KEYS if inner.get(key) is not None]
    limit = getattr(tokenizer, "model_max_length", None)
    if not known and limit is not None and limit < _NO_LIMIT:
        known = [limit]
    return TextSide(tokenizer=tokenizer, max_length=int(known[0]) if known else _DEFAULT_WINDOW)


def _window(text: TextSide, *sessions: Session) -> TextSide:
    """Cut the window to the smallest of all sessions, so that both models read the same."""
    return functools.reduce(lambda side, session: side.within(session.limits), sessions, text)


@dataclass(frozen=True, kw_only=True)
class _TaskResult:
    """One task on one model."""

    metrics: Mapping[str, tuple[float, float | None]]
    """Value and standard error by metric, the task's first metric first."""
    documents: int
    by_document: Mapping[str, list[float]]
    """Values by metric, where a document has one: what a paired difference is made of."""


def _results(
    session: Session,
    text: TextSide,
    suite: Suite,
    *,
    stepwise: bool,
    seed: int,
    progress: Progress,
    side: str,
) -> dict[str, _TaskResult]:
    """Score one model; tasks are reloaded, since they keep answers."""
    from lm_eval.evaluator import evaluate

    from nmexport.verification.tasks_adapter import SessionLM

    with opened(suite, seed=seed, progress=progress if side == "dense" else None) as loaded:
        model = SessionLM(
            session,
            text,
            stepwise=stepwise,
            progress=progress,
            label=f"verify: tasks, {side}",
            seed=seed,
        )
        results = evaluate(
            lm=model, task_dict=loaded, limit=suite.limit, bootstrap_iters=_BOOTSTRAP
        )
    return {name: _task_result(results, name) for name in loaded["tasks"]}


def _task_result(results: Mapping[str, Any], name: str) -> _TaskResult:
    """Pick one task from the harness's answer, whose keys are `acc,none`, `acc_stderr,none`."""
    row = results["results"][name]
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else key
        metrics[label] = (float(value), _number(stderr))
    samples = results["samples"][name]
    return _TaskResult(
        metrics=metrics,
        documents=int(results["n-samples"][name]["effective"]),
        by_document={metric: _by_document(samples, metric) for metric in metrics},
    )


def _by_document(samples: Sequence[Mapping[str, Any]], label: str) -> list[float]:
    """List a metric's value on each document, in order; empty where it has none."""
    metric, _, kind = label.partition(",")
    rows = [row for row in samples if row.get("filter", "none") == (kind or "none")]
    values = [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return numbers if len(numbers) == len(values) else []


def _figures(dense: _TaskResult, sparse: _TaskResult) -> TaskScore:
    """Make a task's entry in the report."""
    scores = {
        metric: MetricScore(
            dense=dense.metrics[metric][0],
            sparse=sparse.metrics[metric][0],
            dense_stderr=dense.metrics[metric][1],
            sparse_stderr=sparse.metrics[metric][1],
            difference_stderr=paired_stderr(dense.by_document[metric], sparse.by_document[metric]),
        )
        for metric in dense.metrics
    }
    metric, first = next(iter(scores.items()))
    return TaskScore(
        **vars(first),
        stderr=first.sparse_stderr,
        n=sparse.documents,
        metric=metric,
        metrics=scores,
    )


def paired_stderr(dense: Sequence[float], sparse: Sequence[float]) -> float | None:
    """Compute the standard error of the mean of `sparse - dense`; None below two pairs."""
    if len(dense) != len(sparse) or len(dense) < 2:  # noqa: PLR2004 - one value has no spread
        return None
    differences = [after - before for before, after in zip(dense, sparse, strict=True)]
    mean = math.fsum(differences) / len(differences)
    squares = math.fsum((value - mean) ** 2 for value in differences)
    return math.sqrt(squares / (len(differences) - 1) / len(differences))


def _number(value: object) -> float | None:
    """A standard error; the harness writes `N/A` where it has none."""
    return float(value) if isinstance(value, int | float) else None
