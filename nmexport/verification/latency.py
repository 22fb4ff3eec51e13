"""Latency of the dense and the sparse model, interleaved in one process on the real KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nmexport.report.model import (
    DecodeTimes,
    Latency,
    PhaseTimes,
    PrefillTimes,
    SideTimes,
    Speedup,
)
from nmexport.timing import interleave, median, milliseconds, percentiles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session

PROTOCOL = (
    "Dense and sparse run in one process, turn and turn about, and who goes first alternates. "
    "Prefill: one prompt, empty cache. "
    "Decode: one token on the cache that a prefill of `context` tokens left, every run from that "
    "same cache. A run ends with the likeliest next token on the host. "
    "Warm-up runs are not counted. "
    "Times are wall time of a whole step as a caller sees it. A GPU's own time of a decode step is "
    "that of one among many that are queued without waiting in between; the host's is the rest. "
    "A speed-up is the ratio of medians; "
    "its interval holds 95 % of 1000 bootstrap resamples of the runs."
)
QUEUED_STEPS = 16
"""Steps that are queued at once: enough that starting the first counts for little."""
QUEUED_ROUNDS = 5
_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)  # percentiles that hold 95 %


def speedup_interval(
    dense_ms: list[float], sparse_ms: list[float], *, seed: int = 0
) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of `median(dense) / median(sparse)`."""
    rng = np.random.default_rng(seed)

    def medians(samples: list[float]) -> NDArray[np.float64]:
        drawn = rng.choice(np.asarray(samples), size=(_RESAMPLES, len(samples)))
        middle: NDArray[np.float64] = np.median(drawn, axis=1)
        return middle

    low, high = np.percentile(medians(dense_ms) / medians(sparse_ms), _INTERVAL)
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Which runs are timed, and how often."""

    prompt: NDArray[np.int64]
    """Token ids `[1, S]` to prefill."""
    context: NDArray[np.int64]
    """Token ids `[B, C]` that fill the cache for decoding."""
    runs: int
    """Counted runs of each model and phase, at least 1."""
    warmup: int
    """Uncounted runs before."""
    device: str
    """Name of the device, for the report."""
    progress: Progress
    """Counts the runs."""


class Side:
    """One model with a cache to decode from."""

    def __init__(self, session: Session, timing: Timing) -> None:
        self.session = session
        self.prompt = timing.prompt
        session.cache = None  # its memory is free for this one
        chosen, cache = session.next_tokens(None, timing.context)
        self.next_token = chosen[:, None].astype(np.int64)
        self.cache = session.keep(cache)
        self._after: object = None
        """What the last step returned; it is freed outside of the time."""

    def prefill_ms(self) -> float:
        """Time one prompt."""
        self.session.cache = None  # its memory is free for this one
        return milliseconds(lambda: self.session.next_tokens(None, self.prompt))

    def decode_ms(self) -> float:
        """Time one token on the cache."""
        cache, self._after = self.session.resume(self.cache), None

        def step() -> None:
            self._after = self.session.next_tokens(cache, self.next_token)

        return milliseconds(step)

    def device_ms(self) -> float | None:
        """Measure the GPU's time of that token; None where it cannot be told."""
        if not self.session.on_gpu:
            return None
        cache, self._after = self.session.resume(self.cache), None
        return self.session.queued_step_ms(cache, self.next_token, QUEUED_STEPS)


def compare(
    dense: Session, sparse: Session, timing: Timing, *, stored: Session | None = None
) -> Latency:
    """Time the baseline and the model under test.

    Args:
        dense: The baseline.
        sparse: The model under test.
        timing: What is timed, and how often.
        stored: The dense model in the sparse one's integers, timed in turns with them.
    """
    sessions = {"dense": dense, "sparse": sparse}
    if stored is not None:
        sessions["stored"] = stored
    sides = {name: Side(session, timing) for name, session in sessions.items()}

    def track(label: str) -> Iterable[int]:
        return timing.progress.track(range(timing.runs), label=label, total=timing.runs)

    # A loop for each phase: a prefill in between would leave other data in the caches.
    prefill = interleave(
        {name: side.prefill_ms for name, side in sides.items()},
        track("prefill timing"),
        warmup=timing.warmup,
    )
    decode = interleave(
        {name: side.decode_ms for name, side in sides.items()},
        track("decode timing"),
        warmup=timing.warmup,
    )
    device = interleave(
        {name: side.device_ms for name, side in sides.items()}, range(QUEUED_ROUNDS), warmup=0
    )

    def times(name: str) -> SideTimes:
        return side_times(prefill[name], decode[name], timing, device_ms=middle(device[name]))

    def speedup_over(name: str) -> Speedup:
        return Speedup(
            prefill=median(prefill[name]) / median(prefill["sparse"]),
            decode=median(decode[name]) / median(decode["sparse"]),
            prefill_interval=speedup_interval(prefill[name], prefill["sparse"]),
            decode_interval=speedup_interval(decode[name], decode["sparse"]),
        )

    return Latency(
        runtime=sparse.runtime,
        device=timing.device,
        threads=sparse.threads,
        runs=timing.runs,
        warmup=timing.warmup,
        dense=times("dense"),
        sparse=times("sparse"),
        stored=None if stored is None else times("stored"),
        speedup=speedup_over("dense"),
        over_stored=None if stored is None else speedup_over("stored"),
        protocol=PROTOCOL,
    )


def side_times(
    prefill_ms: Sequence[float],
    decode_ms: Sequence[float],
    timing: Timing,
    *,
    device_ms: float | None = None,
) -> SideTimes:
    """Summarise one model's runs.

    Args:
        prefill_ms: Times of the prompt; empty where it did not run.
        decode_ms: Times of one token.
        timing: What was timed.
        device_ms: The GPU's time of one token; None where there is none.
    """
    tokens, (batch, length) = int(timing.prompt.size), timing.context.shape
    decode = summary(decode_ms, tokens=batch)
    return SideTimes(
        prefill=PrefillTimes(tokens=tokens, **vars(summary(prefill_ms, tokens=tokens))),
        decode=DecodeTimes(
            batch=batch,
            context=length,
            device_ms=device_ms,
            host_us=host_us(decode, device_ms),
            **vars(decode),
        ),
    )


def host_us(times: PhaseTimes, device_ms: float | None) -> float | None:
    """Subtract the GPU's time of a step, in microseconds; None where either is missing."""
    if times.p50_ms is None or device_ms is None:
        return None
    return (times.p50_ms - device_ms) * 1e3


def middle(samples: Sequence[float | None]) -> float | None:
    """Return the median of what was measured; None where nothing was."""
    measured = [sample for sample in samples if sample is not None]
    return median(measured) if measured else None


def summary(samples_ms: Sequence[float], *, tokens: int) -> PhaseTimes:
    """Compute percentiles and throughput of runs that each process `tokens` tokens."""
    if not samples_ms:
        return PhaseTimes()
    p50, p90, p99 = percentiles(samples_ms, (50, 90, 99))
    return PhaseTimes(
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        tokens_per_s=tokens / p50 * 1e3,
        runs=len(samples_ms),
        samples_ms=tuple(samples_ms),
    )
