"""R-Sparse (arXiv 2504.19449): a low-rank part of the weight that meets every channel.

Dropped channels are small, and what they would have added is well told by few directions: their
product with the dominant part of W. It costs two thin dense products at run time.
"""

from __future__ import annotations

import torch

from nmexport.sparsity.linear import Remainder

_SPARE = 8  # directions beyond the rank, which make the randomised decomposition exact enough
_ITERATIONS = 4


def rank_within(share: float, channels: int, outputs: int) -> int:
    """The largest rank whose factors are no larger than a share of the weight; at least 1.

    Args:
        share: Of the K * O elements of the weight.
        channels: K.
        outputs: O.
    """
    most = int(share * channels * outputs / (channels + outputs))
    return max(1, min(most, channels, outputs))


def remainder_of(weight: torch.Tensor, rank: int, *, seed: int = 0) -> Remainder:
    """The best approximation of that rank, by a seeded randomised decomposition.

    Args:
        weight: `[O, K]`, the dense linear's weight.
        rank: r.
        seed: Of the random directions that the decomposition starts from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        directions = min(rank + _SPARE, *weight.shape)
        left, sizes, right = torch.svd_lowrank(
            weight.detach().cpu().float().t(), q=directions, niter=_ITERATIONS
        )
    inner = left[:, :rank] * sizes[:rank]
    return Remainder(inner.contiguous(), right[:, :rank].t().contiguous())
