"""Latency of a work directory's engine, sparse against dense, outside of a build."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nmexport.bench.context import check_context
from nmexport.environment import device_and_clocks, device_name, probe
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_session
from nmexport.verification import latency

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.progress import Progress
    from nmexport.report.model import Latency
    from nmexport.runtimes.engine import Engine, Side
    from nmexport.runtimes.session import Session


def bench_engines(
    work: Path,
    *,
    prefill_tokens: int = 128,
    decode_context: int = 128,
    batch: int = 1,
    runs: int = 30,
    warmup: int = 3,
    seed: int = 0,
    progress: Progress,
) -> Latency:
    """Time the dense and the sparse model of a work directory, interleaved.

    Where the weights are integers, the dense model in them is timed too.

    Args:
        work: The work directory.
        prefill_tokens: Tokens of the timed prompt.
        decode_context: Tokens in the cache of the timed decode step.
        batch: Sequences of the timed decode step.
        runs: Counted runs of each model and phase.
        warmup: Uncounted runs before.
        seed: Of the random tokens.
        progress: Where to count.

    Returns:
        The report's `latency`.

    Raises:
        ArtifactError: if the work directory holds no engine, or one that cannot be opened.
        EnvironmentFault: if the engine needs a native library that is missing here.
    """
    engine = work / "engine" / "current"
    described = read_engine(engine)
    model = described.model.parent
    check_context(model, prefill_tokens, options="--prefill-tokens")
    # A decode step adds a token to its context.
    check_context(model, decode_context + 1, options="--decode-context and a decoded token")
    with contextlib.ExitStack() as stack:
        sides: dict[Side, Session] = {
            side: stack.enter_context(open_session(engine, side=side, elsewhere=True))
            for side in _sides(described)
        }
        sparse = sides["sparse"]
        rng = np.random.default_rng(seed)
        name = device_name(probe(), on_gpu=sparse.on_gpu)
        timing = latency.Timing(
            prompt=rng.integers(sparse.vocabulary_size, size=(1, prefill_tokens)),
            context=rng.integers(sparse.vocabulary_size, size=(batch, decode_context)),
            runs=runs,
            warmup=warmup,
            device=name,
            progress=progress,
        )
        times = latency.compare(sides["dense"], sparse, timing, stored=sides.get("stored"))
        return replace(times, device=device_and_clocks(name, on_gpu=sparse.on_gpu))


def _sides(engine: Engine) -> tuple[Side, ...]:
    return ("dense", "sparse") if engine.stored_model is None else ("dense", "sparse", "stored")
