"""Latency of the dense and the sparse model, interleaved in one process on the real KV cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session

PROTOCOL = (
    "Dense and sparse run in one process, turn and turn about, and who goes first alternates. "
    "Prefill: one prompt, all logits, empty cache. Decode: one token on the cache that a prefill "
    "of `context` tokens left, every run from that same cache. Warm-up runs are not counted. "
    "Times are wall time of a whole step as a caller sees it. A speed-up is the ratio of medians; "
    "its interval holds 95 % of 1000 bootstrap resamples of the runs."
)
_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)  # percentiles that hold 95 %


def percentile(samples: Iterable[float], rank: float) -> float:
    """Return the value below which `rank` percent of the samples lie, linear between neighbours.

    Raises:
        ValueError: if there is no sample or the rank is outside 0 to 100.
    """
    values = np.fromiter(samples, dtype=np.float64)
    if not values.size or not 0 <= rank <= 100:  # noqa: PLR2004 - percent
        raise ValueError(f"percentile {rank} of {values.size} samples")
    return float(np.percentile(values, rank))


def speedup_interval(
    dense_ms: list[float], sparse_ms: list[float], *, seed: int = 0
) -> list[float]:
    """95 % bootstrap interval of `median(dense) / median(sparse)`."""
    rng = np.random.default_rng(seed)

    def medians(samples: list[float]) -> NDArray[np.float64]:
        drawn = rng.choice(np.asarray(samples), size=(_RESAMPLES, len(samples)))
        middle: NDArray[np.float64] = np.median(drawn, axis=1)
        return middle

    low, high = np.percentile(medians(dense_ms) / medians(sparse_ms), _INTERVAL)
    return [float(low), float(high)]


class Side:
    """One model with a cache to decode from."""

    def __init__(
        self, session: Session, prompt: NDArray[np.int64], context: NDArray[np.int64]
    ) -> None:
        self.session = session
        self.prompt = prompt
        logits = session.prefill(context)
        self.next_token = logits[:, -1:].argmax(axis=-1).astype(np.int64)
        self.cache = session.keep(session.cache)

    def prefill_ms(self) -> float:
        """Time one prompt."""
        self.session.cache = None  # its memory is free for this one
        return _timed(lambda: self.session.extend_last(None, self.prompt))

    def decode_ms(self) -> float:
        """Time one token on the cache."""
        self.session.cache = self.session.resume(self.cache)
        return _timed(lambda: self.session.decode_step(self.next_token))


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - started) / 1e6


def interleave(
    dense: Callable[[], float], sparse: Callable[[], float], *, runs: Iterable[int], warmup: int
) -> tuple[list[float], list[float]]:
    """Call two timed functions turn and turn about; who goes first alternates.

    Args:
        dense: Runs once and returns milliseconds.
        sparse: The same for the other side.
        runs: One item for each counted run.
        warmup: Uncounted runs of both before.

    Returns:
        Milliseconds of the counted runs, dense and sparse.
    """
    for _ in range(warmup):
        dense()
        sparse()
    dense_ms: list[float] = []
    sparse_ms: list[float] = []
    turns = [(dense, dense_ms), (sparse, sparse_ms)]
    for _ in runs:
        for timed, samples in turns:
            samples.append(timed())
        turns.reverse()
    return dense_ms, sparse_ms


def compare(
    dense: Session,
    sparse: Session,
    *,
    prompt: NDArray[np.int64],
    context: NDArray[np.int64],
    runs: int,
    warmup: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Time both models and return the report's `latency`.

    Args:
        dense: The baseline.
        sparse: The model under test.
        prompt: Token ids `[1, S]` to prefill.
        context: Token ids `[B, C]` that fill the cache for decoding.
        runs: Counted runs of each model and phase, at least 1.
        warmup: Uncounted runs before.
        device: Name of the processor, for the report.
        progress: Where to count.
    """
    sides = Side(dense, prompt, context), Side(sparse, prompt, context)

    def tracked(label: str) -> Iterable[int]:
        return progress.track(range(runs), label=label, total=runs)

    # A loop for each phase: a prefill in between would leave other data in the caches.
    prefill = interleave(
        sides[0].prefill_ms, sides[1].prefill_ms, runs=tracked("prefill timing"), warmup=warmup
    )
    decode = interleave(
        sides[0].decode_ms, sides[1].decode_ms, runs=tracked("decode timing"), warmup=warmup
    )

    def side(index: int) -> dict[str, Any]:
        tokens, (batch, length) = int(prompt.size), context.shape
        return {
            "prefill": {"tokens": tokens, **summary(prefill[index], tokens=tokens)},
            "decode": {
                "batch": batch,
                "context": length,
                **summary(decode[index], tokens=batch),
            },
        }

    return {
        "runtime": sparse.runtime,
        "device": device,
        "threads": sparse.threads,
        "runs": runs,
        "warmup": warmup,
        "dense": side(0),
        "sparse": side(1),
        "speedup": {
            "prefill": percentile(prefill[0], 50) / percentile(prefill[1], 50),
            "decode": percentile(decode[0], 50) / percentile(decode[1], 50),
            "prefill_interval": speedup_interval(*prefill),
            "decode_interval": speedup_interval(*decode),
        },
        "protocol": PROTOCOL,
    }


def summary(samples_ms: list[float], *, tokens: int) -> dict[str, Any]:
    """Percentiles and throughput of runs that each process `tokens` tokens."""
    median = percentile(samples_ms, 50)
    return {
        "p50_ms": median,
        "p90_ms": percentile(samples_ms, 90),
        "p99_ms": percentile(samples_ms, 99),
        "tokens_per_s": tokens / median * 1e3,
        "runs": len(samples_ms),
        "samples_ms": samples_ms,
    }
