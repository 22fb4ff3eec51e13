"""Measures the dense model in the sparse one's integers, as a user would run it instead.

Sparsity in integers has to be held against dense in the same integers. Both are timed in one run,
turn by turn; accuracy is held against the dense model in floats, on the same text.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from nmexport.progress import busy
from nmexport.report.model import Scores, StoredDense
from nmexport.runtimes.opening import open_session
from nmexport.verification import accuracy, examples, latency
from nmexport.verification.sides import timing

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.verification.subject import Subject


def measure(subject: Subject) -> StoredDense | None:
    """Score and time the three models; None where there is no dense model in integers.

    Raises:
        ArtifactError: if a model cannot be opened.
        EnvironmentFault: if the engine's native library is missing here.
    """
    engine, windows = subject.engine, subject.windows
    if engine.stored_model is None or engine.dense_model is None:
        return None
    with ExitStack() as stack:
        folder = subject.engine_folder
        stored = stack.enter_context(open_session(folder, side="stored", elsewhere=True))
        with open_session(folder, side="dense", elsewhere=True) as dense:
            tracked = subject.progress.track(
                windows, label="verify: dense in integers", total=len(windows)
            )
            scores = accuracy.compare(dense, stored, tracked)
        with busy(subject.progress, "verify: what dense in integers writes"):
            texts = examples.write(stored, subject)
        sparse = stack.enter_context(open_session(folder, elsewhere=True))
        times = latency.compare(stored, sparse, timing(subject, sparse))
    return StoredDense(
        scores=Scores(**{name: getattr(scores, name) for name in Scores.__dataclass_fields__}),
        latency=times,
        texts=texts,
        dense_bytes=_bytes(engine.dense_model),
        stored_bytes=_bytes(engine.stored_model),
        sparse_bytes=_bytes(engine.model),
    )


def _bytes(model: Path) -> int:
    """Return the size of a model's file and weights."""
    return sum(path.stat().st_size for path in (model, model.with_name(f"{model.name}.data")))
