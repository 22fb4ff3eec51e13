"""Where learning a block starts: gain, bias and compensation of its linears by least squares.

With s the kept values of a token in the sparse stream, y what the linear makes of them as it
stands, and t what the dense linear makes in the dense stream, gain o and bias b minimise the sum
over tokens of `(t - o y - b)^2`, output by output. The compensation M minimises what is left,
`||r - s M||^2 + ridge ||M||^2`, and is cut to the rank that loses least of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Of the mean squared input: text is never enough for directions that hardly occur.
_RIDGE = 0.01
_FLOOR = 1e-12
_SPARE = 8  # directions beyond the rank while they are searched for
_POWERS = 4
LARGEST_INPUT = 8192
"""Channels beyond which second moments would take more memory than the block itself."""


@dataclass
class Moments:
    """Sums over tokens of one site's kept values: with a channel of ones, all that is needed."""

    inputs: torch.Tensor
    """`[K + 1, K + 1]` float64: products of the kept values, the last channel all ones."""
    targets: dict[str, torch.Tensor]
    """`[K + 1, O]` float64 by linear: products with the dense outputs."""

    @classmethod
    def empty(cls, channels: int, outputs: dict[str, int]) -> Moments:
        """Nothing seen yet.

        Args:
            channels: K.
            outputs: O by linear.
        """
        size = channels + 1
        return cls(
            inputs=torch.zeros(size, size, dtype=torch.float64),
            targets={
                name: torch.zeros(size, count, dtype=torch.float64)
                for name, count in outputs.items()
            },
        )

    def add(self, kept: torch.Tensor, targets: dict[str, torch.Tensor]) -> None:
        """Count in some tokens: kept values `[T, K]`, dense outputs `[T, O]` by linear."""
        ones = kept.new_ones(len(kept), 1)
        whole = torch.cat([kept, ones], dim=1)
        self.inputs += (whole.t() @ whole).double().cpu()
        for name, target in targets.items():
            self.targets[name] += (whole.t() @ target.float()).double().cpu()

    @property
    def tokens(self) -> float:
        """How many were seen."""
        return float(self.inputs[-1, -1])


def gain_and_bias(
    moments: Moments, name: str, weight: torch.Tensor, *, gains: bool, biases: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return o and b of one linear, `[O]` float64 each; 1 and 0 where they are not asked for.

    Args:
        moments: Of its site.
        name: Of the linear.
        weight: `[K + 1, O]` float64, what the linear computes now: its last row is a bias.
        gains: Whether o is free.
        biases: Whether b is.
    """
    products, tokens = moments.inputs @ weight, moments.tokens
    squares = (weight * products).sum(dim=0)
    crossed = (weight * moments.targets[name]).sum(dim=0)
    own, wanted = products[-1], moments.targets[name][-1]  # sums of y and t
    gain, bias = torch.ones_like(own), torch.zeros_like(own)
    if gains:
        if biases:
            squares, crossed = squares - own * own / tokens, crossed - own * wanted / tokens
        gain = torch.where(squares > _FLOOR, crossed / squares.clamp_min(_FLOOR), gain)
    if biases:
        bias = (wanted - gain * own) / tokens
    return gain, bias


def compensation(
    moments: Moments, name: str, weight: torch.Tensor, rank: int, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A `[K, r]` and B `[r, O]` float64: A B is the best change of the weight of this rank.

    Columns of A have length 1: that is the size of what learning steps through.

    Args:
        moments: Of its site.
        name: Of the linear.
        weight: `[K + 1, O]` float64, what the linear computes now, gain and bias included.
        rank: r.
        seed: Of where the search for the largest directions starts.

    Raises:
        torch.linalg.LinAlgError: if the moments are not finite.
    """
    channels = len(weight) - 1
    gram = moments.inputs[:channels, :channels].clone()
    left = (moments.targets[name] - moments.inputs @ weight)[:channels]
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + _FLOOR)
    root = torch.linalg.cholesky(gram)  # gram = root root^T
    # In coordinates where all inputs occur alike, the best rank is that of the largest directions.
    turned = torch.linalg.solve_triangular(root, left, upper=False)
    basis = _largest_directions(turned, rank, seed)  # [K, r]
    inner = torch.linalg.solve_triangular(root.t(), basis, upper=True)
    length = inner.norm(dim=0).clamp_min(_FLOOR)
    return inner / length, length.unsqueeze(1) * (basis.t() @ turned)


def _largest_directions(matrix: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """Orthonormal `[K, r]` that spans about the r largest left singular directions of `[K, O]`.

    By powers of the matrix, which costs a few products where a decomposition costs hours on the
    widest layers.
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + _SPARE, *matrix.shape)
    drawn = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ drawn).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix @ (matrix.t() @ basis)).Q
    small = basis.t() @ matrix  # [width, O]
    _, vectors = torch.linalg.eigh(small @ small.t())
    found: torch.Tensor = basis @ vectors[:, -rank:].flip(1)
    return found
