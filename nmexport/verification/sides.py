"""Measures accuracy and speed of the dense and the sparse model, or of the sparse one alone."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.calibration import corpus
from nmexport.environment import device_name
from nmexport.generation.tokenizer import Tokenizer
from nmexport.progress import busy
from nmexport.report.model import Example
from nmexport.runtimes.opening import open_session
from nmexport.verification import accuracy, alone, continuation, examples, latency, tasks
from nmexport.verification.subject import latency_tokens
from nmexport.verification.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from nmexport.recipe import EvaluationSection
    from nmexport.report.model import Accuracy, Latency, Scores, TaskScore
    from nmexport.runtimes.session import Session
    from nmexport.verification.accuracy import LateLogits
    from nmexport.verification.subject import Subject

# What decode-only scoring holds of a batch's dense logits, and of its caches: a step's past and
# present. More sequences at a time share more of the weights that a step reads.
_LOGITS_BYTES = 832 << 20
_CACHE_BYTES = 1 << 30


def measure(subject: Subject) -> tuple[Accuracy, Latency]:
    """Score and time what the engine holds: both models, or the sparse one where there is no other.

    Raises:
        ArtifactError: if a model cannot be opened.
        EnvironmentFault: if the engine's native library is missing here.
    """
    if subject.engine.dense_model is None:
        return _sparse_alone(subject)
    return _dense_against_sparse(subject)


def _dense_against_sparse(subject: Subject) -> tuple[Accuracy, Latency]:
    evaluation, progress, windows = subject.recipe.evaluation, subject.progress, subject.windows
    with contextlib.ExitStack() as stack:
        with busy(progress, "verify: open the models"):
            engine = subject.engine_folder
            dense = stack.enter_context(open_session(engine, side="dense", elsewhere=True))
            sparse = stack.enter_context(open_session(engine, elsewhere=True))
        tracked = progress.track(windows, label="verify: perplexity", total=len(windows))
        # Decode-only sparsity says something new where the model is sparse in prefill too.
        wanted = evaluation.decode_only and subject.phases == "all"
        late = accuracy.LateLogits(_LOGITS_BYTES if wanted else 0)
        scores = accuracy.compare(dense, sparse, tracked, phases=subject.phases, late=late)
        continued = continuation.compare(
            dense, sparse, subject.prompts, evaluation.generate_tokens, progress=progress
        )
        decoded = _decode_only(subject, dense, sparse, late) if wanted else None
        written = _examples(subject, sparse, dense)
        task_scores, tasks_protocol = _tasks(subject, dense, sparse)
        with busy(progress, "verify: latency"):  # runs to warm up are counted by no other bar
            times = latency.compare(dense, sparse, timing(subject, sparse))
    scores = replace(
        scores,
        dataset=_dataset(evaluation),
        continuation=continued,
        examples=written,
        decode_only=decoded,
        tasks=task_scores,
        tasks_protocol=tasks_protocol,
        protocol=_protocol(subject),
    )
    return scores, times


def _sparse_alone(subject: Subject) -> tuple[Accuracy, Latency]:
    progress, windows = subject.progress, subject.windows
    with contextlib.ExitStack() as stack:
        with busy(progress, "verify: open the model"):
            sparse = stack.enter_context(open_session(subject.engine_folder, elsewhere=True))
        tracked = progress.track(windows, label="verify: perplexity", total=len(windows))
        scores = alone.score(sparse, tracked, phases=subject.phases)
        written = _examples(subject, sparse, None)
        with busy(progress, "verify: latency"):
            times = alone.time(sparse, timing(subject, sparse))
    scores = replace(
        scores,
        dataset=_dataset(subject.recipe.evaluation),
        continuation=alone.no_continuation(subject.prompts),
        examples=written,
        protocol=_protocol(subject),
    )
    return scores, times


def _examples(subject: Subject, sparse: Session, dense: Session | None) -> tuple[Example, ...]:
    """Let both models, or the sparse one alone, continue the recipe's examples."""
    with busy(subject.progress, "verify: what each model writes"):
        texts = examples.write(sparse, subject)
        others = {} if dense is None else examples.write(dense, subject)
    return tuple(
        Example(prompt=prompt, sparse=text, dense=others.get(prompt))
        for prompt, text in texts.items()
    )


def timing(subject: Subject, sparse: Session) -> latency.Timing:
    """Return how the recipe times a build."""
    section = subject.recipe.latency
    prompt, context = latency_tokens(subject.windows, section)
    return latency.Timing(
        prompt=prompt,
        context=context,
        runs=section.runs,
        warmup=section.warmup,
        device=device_name(subject.environment, on_gpu=sparse.on_gpu),
        progress=subject.progress,
    )


def _protocol(subject: Subject) -> str:
    return f"{corpus.protocol(subject.recipe.evaluation)}. {accuracy.protocol(subject.phases)}"


def _dataset(section: EvaluationSection) -> str:
    path = Path(section.corpus)
    return path.name if path.suffix in {".txt", ".jsonl"} else section.corpus


def _decode_only(subject: Subject, dense: Session, sparse: Session, late: LateLogits) -> Scores:
    """Score sparsity in decode only."""
    windows = subject.windows
    batch = _decode_batch_size(sparse, windows)
    batches = [windows[start : start + batch] for start in range(0, len(windows), batch)]
    return accuracy.decode_only(
        dense,
        sparse,
        batches,
        late=late,
        progress=subject.progress,
        label="verify: decode-only sparsity",
    )


def _decode_batch_size(sparse: Session, windows: NDArray[np.int64]) -> int:
    """Return how many windows of `[W, L]` decode-only scoring decodes together."""
    count, length = windows.shape
    scored = length - accuracy.prompt_length(windows[0])
    most: list[int] = [count, _LOGITS_BYTES // (4 * sparse.vocabulary_size * scored)]
    if sparse.exposes_cache:
        most.append(_CACHE_BYTES // (2 * length * sparse.cache_bytes_per_token))
    if sparse.limits.batch is not None:
        most.append(sparse.limits.batch)
    return max(1, min(most))


def _tasks(
    subject: Subject, dense: Session, sparse: Session
) -> tuple[Mapping[str, TaskScore], str | None]:
    """Score the tasks, and say how they were scored."""
    suite = Suite.of(subject.recipe.evaluation)
    if suite is None:
        return {}, None
    folder = subject.engine.model.parent
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = tasks.text_side(Tokenizer(folder), config)
    scored = tasks.compare(
        dense,
        sparse,
        text,
        suite,
        phases=subject.phases,
        seed=subject.recipe.seed,
        progress=subject.progress,
    )
    return scored, tasks.protocol(subject.phases, text, dense, sparse)
