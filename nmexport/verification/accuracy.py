"""Perplexity and divergence of a sparse session against a dense one, in one pass over windows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.verification.divergence import DivergenceSum
from nmexport.verification.perplexity import NllSum, log_softmax, ratio_stderr, token_nll

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from nmexport.layers import Phases
    from nmexport.runtimes.session import Session

# Rows of logits that become float64 at once: 64 x 150k tokens x 8 bytes is 77 MB a copy.
_ROWS = 64

_WHOLE = (
    "Fixed windows that do not overlap, run as whole prompts with no context from outside the "
    "window. A window is scored from its second token. "
)
_DECODED = (
    "Fixed windows that do not overlap, with no context from outside the window. The first half "
    "of a window is the prompt, which runs dense; the sparse model reads the rest token by token "
    "through its cache, and what it predicts from there is scored, for both models. "
)
_FIGURES = (
    "Negative log-likelihoods are float64 log-softmax of the runtime's logits, averaged over all "
    "scored tokens; perplexity is the exponential of that mean. KL(dense || sparse), in nats, and "
    "top-1 agreement are means over the same tokens. Dense and sparse logits both come from the "
    "shipped ONNX files."
)


class _WindowComparison:
    """Accumulators for one dense and one sparse model."""

    def __init__(self) -> None:
        self.dense = NllSum()
        self.sparse = NllSum()
        self.divergence = DivergenceSum()

    def add(
        self, window: NDArray[np.int64], dense: NDArray[np.float32], sparse: NDArray[np.float32]
    ) -> None:
        """Add a window `[L]` with both models' logits `[L, V]`."""
        targets = window[1:]
        dense_nll, sparse_nll = [], []
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, min(start + _ROWS, len(targets)))
            dense_rows, sparse_rows = log_softmax(dense[rows]), log_softmax(sparse[rows])
            dense_nll.append(token_nll(dense_rows, targets[rows]))
            sparse_nll.append(token_nll(sparse_rows, targets[rows]))
            self.divergence.add(dense_rows, sparse_rows)
        self.dense.add(np.concatenate(dense_nll))
        self.sparse.add(np.concatenate(sparse_nll))


def protocol(phases: Phases) -> str:
    """How the figures of `compare` come about, in words."""
    return (_DECODED if phases == "decode" else _WHOLE) + _FIGURES


def compare(
    dense: Session,
    sparse: Session,
    windows: Iterable[NDArray[np.int64]],
    *,
    phases: Phases = "all",
) -> dict[str, Any]:
    """Score both models on windows `[L]` of token ids, L at least 2.

    A model that is sparse in decode only is dense on a prompt: it is scored on the second half of
    each window, read token by token.

    Returns:
        The report's `accuracy` figures, without the data set's name.
    """
    sums = _WindowComparison()
    for window in windows:
        logits = dense.prefill(window[None, :])[0]
        if phases == "decode":
            prompt = len(window) // 2
            sums.add(window[prompt:], logits[prompt:], _teacher_forced(sparse, window, prompt))
        else:
            sums.add(window, logits, sparse.prefill(window[None, :])[0])
    return {
        "tokens": sums.dense.tokens,
        "windows": len(sums.dense.window_tokens),
        "dense": _side(sums.dense),
        "sparse": _side(sums.sparse),
        "perplexity_ratio": math.exp(sums.sparse.mean - sums.dense.mean),
        "perplexity_ratio_stderr": ratio_stderr(sums.dense, sums.sparse),
        "kl_mean": sums.divergence.kl_mean,
        "top1_agreement": sums.divergence.top1_agreement,
    }


def _teacher_forced(
    session: Session, window: NDArray[np.int64], prompt: int
) -> NDArray[np.float32]:
    """Logits `[L - 1 - prompt, V]` of the tokens after the prompt, the last one left out."""
    session.prefill(window[None, :prompt])
    steps = [session.decode_step(token[None, None])[0, 0] for token in window[prompt:-1]]
    return np.stack(steps)


def _side(sums: NllSum) -> dict[str, Any]:
    return {
        "perplexity": sums.perplexity,
        "nll_mean": sums.mean,
        "window_nll_mean": sums.window_means,
    }
