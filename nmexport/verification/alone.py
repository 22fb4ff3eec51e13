"""Measures a sparse model without a dense baseline: its own figures, and null comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.report.model import Accuracy, Continuation, Latency, Likelihood, Speedup
from nmexport.verification import accuracy, continuation, latency
from nmexport.verification.perplexity import NllSum, log_softmax, token_nll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session
    from nmexport.store.layers import ModelPhases

WHY = "the recipe leaves out the dense baseline (--no-dense-baseline)"
NOTE = (
    "There is no dense baseline, so nothing here says what sparsity costs or gains: perplexity "
    "and times are the sparse model's alone."
)
_PROTOCOL = (
    "The sparse model runs alone. "
    "Prefill: one prompt, the last token's logits, empty cache. "
    "Decode: one token on the cache that a prefill of `context` tokens left, every run from that "
    "same cache. Warm-up runs are not counted. "
    "Times are wall time of a whole step as a caller sees it."
)


def score(
    sparse: Session, windows: Iterable[NDArray[np.int64]], *, phases: ModelPhases = "all"
) -> Accuracy:
    """Score the sparse model; see `accuracy.compare`."""
    sums = NllSum()
    for window in windows:
        targets, logits = accuracy.run_window(sparse, window, phases=phases)
        sums.add(token_nll(log_softmax(logits[: len(targets)]), targets))
    return Accuracy(
        why=WHY,
        tokens=sums.tokens,
        windows=len(sums.window_tokens),
        dense=Likelihood(why=WHY),
        sparse=accuracy.likelihood(sums),
    )


def no_continuation(prompts: NDArray[np.int64]) -> Continuation:
    """Say why no continuations were compared."""
    return Continuation(
        why=WHY,
        prompts=int(prompts.shape[0]),
        prompt_tokens=int(prompts.shape[1]),
        generated_tokens=0,
        protocol=continuation.PROTOCOL,
    )


def time(sparse: Session, timing: latency.Timing) -> Latency:
    """Time the sparse model; see `latency.compare`."""
    side = latency.Side(sparse, timing)

    def samples(once: Callable[[], float], label: str) -> list[float]:
        for _ in range(timing.warmup):
            once()
        tracked = timing.progress.track(range(timing.runs), label=label, total=timing.runs)
        return [once() for _ in tracked]

    prefill_ms = samples(side.prefill_ms, "prefill timing")
    decode_ms = samples(side.decode_ms, "decode timing")
    device_ms = latency.middle([side.device_ms() for _ in range(latency.QUEUED_ROUNDS)])
    return Latency(
        runtime=sparse.runtime,
        device=timing.device,
        threads=sparse.threads,
        runs=timing.runs,
        warmup=timing.warmup,
        why=WHY,
        dense=latency.side_times((), (), timing),
        sparse=latency.side_times(prefill_ms, decode_ms, timing, device_ms=device_ms),
        speedup=Speedup(why=WHY),
        protocol=_PROTOCOL,
    )
