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

    from nmexport.runtimes.session import Session

# Rows of logits that become float64 at once: 64 x 150k tokens x 8 bytes is 77 MB a copy.
_ROWS = 64

PROTOCOL = (
    "Fixed windows that do not overlap, run as whole prompts with no context from outside the "
    "window. A window is scored from its second token. Negative log-likelihoods "
    "are float64 log-softmax of the runtime's logits, averaged over all scored tokens; perplexity "
    "is the exponential of that mean. KL(dense || sparse), in nats, and top-1 agreement are means "
    "over the same tokens. Dense and sparse logits both come from the shipped ONNX files."
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


def compare(
    dense: Session, sparse: Session, windows: Iterable[NDArray[np.int64]]
) -> dict[str, Any]:
    """Score both models on windows `[L]` of token ids, L at least 2.

    Returns:
        The report's `accuracy` figures, without the data set's name.
    """
    sums = _WindowComparison()
    for window in windows:
        batch = window[None, :]
        sums.add(window, dense.prefill(batch)[0], sparse.prefill(batch)[0])
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


def _side(sums: NllSum) -> dict[str, Any]:
    return {
        "perplexity": sums.perplexity,
        "nll_mean": sums.mean,
        "window_nll_mean": sums.window_means,
    }
