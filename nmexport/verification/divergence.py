"""How far the sparse model's next-token distributions lie from the dense model's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def token_kl(dense: NDArray[np.float64], sparse: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(dense || sparse) in nats, `[T]`, of log-probabilities `[T, V]`.

    A token that dense rules out contributes nothing, whatever sparse makes of it.
    """
    possible = np.isfinite(dense)
    difference = np.subtract(dense, sparse, where=possible, out=np.zeros_like(dense))
    total: NDArray[np.float64] = (np.exp(dense) * difference).sum(axis=-1)
    return np.maximum(total, 0.0)  # rounding can leave -1e-17 where both are equal


@dataclass
class DivergenceSum:
    """Running sums over tokens."""

    kl_sums: list[float] = field(default_factory=list)
    agreeing: int = 0
    tokens: int = 0

    def add(self, dense: NDArray[np.float64], sparse: NDArray[np.float64]) -> None:
        """Add tokens by their log-probabilities `[T, V]`."""
        self.kl_sums.append(math.fsum(token_kl(dense, sparse).tolist()))
        self.agreeing += int((dense.argmax(axis=-1) == sparse.argmax(axis=-1)).sum())
        self.tokens += dense.shape[0]

    def merge(self, other: DivergenceSum) -> None:
        """Add another's tokens."""
        self.kl_sums += other.kl_sums
        self.agreeing += other.agreeing
        self.tokens += other.tokens

    @property
    def kl_mean(self) -> float:
        """Mean KL(dense || sparse) a token, in nats."""
        return math.fsum(self.kl_sums) / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens at which both rank the same token first."""
        return self.agreeing / self.tokens
