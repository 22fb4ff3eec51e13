"""A sparse model with no dense baseline: its own figures, and null where two compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.verification import accuracy, continuation, latency
from nmexport.verification.perplexity import NllSum, log_softmax, token_nll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session
    from nmexport.store.layers import ModelPhases

WHY = "the recipe leaves out the dense baseline (--no-dense-baseline)"
NOTE = (
    "There is no dense baseline, so nothing here says what sparsity costs or gains: perplexity "
    "and times are the sparse model's alone."
)
_TIMES = ("p50_ms", "p90_ms", "p99_ms", "tokens_per_s")
_PROTOCOL = (
    "The sparse model runs alone. "
    "Prefill: one prompt, the last token's logits, empty cache. "
    "Decode: one token on the cache that a prefill of `context` tokens left, every run from that "
    "same cache. Warm-up runs are not counted. "
    "Times are wall time of a whole step as a caller sees it."
)
_NO_PERPLEXITY = {"perplexity": None, "nll_mean": None, "window_nll_mean": None, "why": WHY}


def score(
    sparse: Session, windows: Iterable[NDArray[np.int64]], *, phases: ModelPhases = "all"
) -> dict[str, Any]:
    """The report's `accuracy`, without the data set's name; see `accuracy.compare`."""
    sums = NllSum()
    for window in windows:
        targets, logits = accuracy.scored(sparse, window, phases=phases)
        sums.add(token_nll(log_softmax(logits[: len(targets)]), targets))
    return {
        "why": WHY,
        "tokens": sums.tokens,
        "windows": len(sums.window_tokens),
        "dense": _NO_PERPLEXITY,
        "sparse": accuracy.side_of(sums),
        **dict.fromkeys(
            ("perplexity_ratio", "perplexity_ratio_stderr", "kl_mean", "top1_agreement")
        ),
        "second_half": None,
    }


def no_continuation(prompts: NDArray[np.int64]) -> dict[str, Any]:
    """The report's `accuracy.continuation`, which compares."""
    return {
        "why": WHY,
        "prompts": int(prompts.shape[0]),
        "prompt_tokens": int(prompts.shape[1]),
        "generated_tokens": 0,
        **dict.fromkeys(
            (
                "free_running_agreement",
                "guided_agreement",
                "first_divergence",
                "median_first_divergence",
            )
        ),
        "protocol": continuation.PROTOCOL,
    }


def time(
    sparse: Session,
    *,
    prompt: NDArray[np.int64],
    context: NDArray[np.int64],
    runs: int,
    warmup: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The report's `latency`; see `latency.compare`."""
    side = latency.Side(sparse, prompt, context)

    def samples(once: Callable[[], float], label: str) -> list[float]:
        for _ in range(warmup):
            once()
        return [once() for _ in progress.track(range(runs), label=label, total=runs)]

    timed = {
        "prefill": samples(side.prefill_ms, "prefill timing"),
        "decode": samples(side.decode_ms, "decode timing"),
    }
    tokens, (batch, length) = int(prompt.size), context.shape
    sizes = {"prefill": {"tokens": tokens}, "decode": {"batch": batch, "context": length}}
    processed = {"prefill": tokens, "decode": batch}
    absent: dict[str, Any] = {**dict.fromkeys(_TIMES), "runs": 0, "samples_ms": []}
    ratios = dict.fromkeys(("prefill", "decode", "prefill_interval", "decode_interval"))
    return {
        "runtime": sparse.runtime,
        "device": device,
        "threads": sparse.threads,
        "runs": runs,
        "warmup": warmup,
        "why": WHY,
        "dense": {phase: {**sizes[phase], **absent} for phase in timed},
        "sparse": {
            phase: {**sizes[phase], **latency.summary(times, tokens=processed[phase])}
            for phase, times in timed.items()
        },
        "speedup": {**ratios, "why": WHY},
        "protocol": _PROTOCOL,
    }
