"""Perplexity: float64 log-probabilities, summed over fixed windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Compute log-probabilities over the last axis, in float64.

    Args:
        logits: `[..., V]` of any float type; `-inf` marks impossible tokens.
    """
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def token_nll(
    log_probabilities: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Look up the negative log-likelihood `[T]` of the targets `[T]` in `[T, V]`."""
    picked = np.take_along_axis(log_probabilities, targets[:, None], axis=-1)
    return np.negative(picked[:, 0])


@dataclass
class NllSum:
    """Running sum of negative log-likelihoods, one entry a window."""

    window_sums: list[float] = field(default_factory=list)
    window_tokens: list[int] = field(default_factory=list)

    def add(self, nll: NDArray[np.float64]) -> None:
        """Add one window's scored tokens, `[T]`."""
        self.window_sums.append(math.fsum(nll.tolist()))
        self.window_tokens.append(int(nll.size))

    def merge(self, other: NllSum) -> None:
        """Append another's windows."""
        self.window_sums += other.window_sums
        self.window_tokens += other.window_tokens

    @property
    def tokens(self) -> int:
        """Scored tokens so far."""
        return sum(self.window_tokens)

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood a token, in nats.

        Raises:
            ValueError: if nothing was scored.
        """
        if not self.tokens:
            raise ValueError("no token was scored")
        return math.fsum(self.window_sums) / self.tokens

    @property
    def perplexity(self) -> float:
        """`exp` of the mean; infinite where that overflows."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf

    @property
    def window_means(self) -> list[float]:
        """Mean negative log-likelihood of each window, in nats."""
        pairs = zip(self.window_sums, self.window_tokens, strict=True)
        return [total / tokens for total, tokens in pairs]


def ratio_stderr(dense: NllSum, sparse: NllSum) -> float | None:
    """Standard error of `sparse.perplexity / dense.perplexity` over windows, paired.

    The ratio is the exponential of a mean difference, so its error is the ratio times the standard
    error of that mean (delta method). None for fewer than two windows.
    """
    differences = np.subtract(sparse.window_means, dense.window_means)
    if differences.size < 2:  # noqa: PLR2004 - one value has no spread
        return None
    ratio = math.exp(sparse.mean - dense.mean)
    return ratio * float(differences.std(ddof=1)) / math.sqrt(differences.size)
