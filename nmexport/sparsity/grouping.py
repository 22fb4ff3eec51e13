"""Groupings: which channels compete with each other for the kept slots of a group.

Neighbouring channels of a real model are large or small together, so groups of consecutive
channels waste slots: all of a group is needed, all of another is not. A permutation that deals
strong and weak channels evenly over the groups costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nmexport.sparsity.pattern import NMPattern

Rule = Callable[[torch.Tensor, int, int], "torch.Tensor | None"]


def channel_order(
    grouping: str, mean_score: torch.Tensor, pattern: NMPattern, *, seed: int = 0
) -> torch.Tensor | None:
    """The permutation `channel_order` of the op contract.

    Args:
        grouping: A name among GROUPINGS.
        mean_score: `[K]`, each channel's score averaged over calibration tokens.
        pattern: N:M; K is a multiple of M.
        seed: Of `random`, and of the shuffle within `balanced`.

    Returns:
        `[K]` int32, or None for consecutive groups.
    """
    order = GROUPINGS[grouping](mean_score, pattern.m, seed)
    return None if order is None else order.to(torch.int32)


def _consecutive(mean_score: torch.Tensor, m: int, seed: int) -> None:
    """The paper's groups."""
    del mean_score, m, seed


def _random(mean_score: torch.Tensor, m: int, seed: int) -> torch.Tensor:
    """Neighbours rarely meet, and nothing else."""
    del m
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(mean_score.numel(), generator=generator)


def _balanced(mean_score: torch.Tensor, m: int, seed: int) -> torch.Tensor:
    """Deal channels, strongest first, one stratum of K/m to every group in a shuffled order.

    Every group gets one channel of each of the m strata of mean score, so groups are alike in
    strength; which of a stratum it gets is random, so neighbours rarely meet.
    """
    channels = mean_score.numel()
    groups = channels // m
    # A stable sort: equal means (dead channels) keep their order on every machine.
    ranked = torch.argsort(mean_score.double().cpu(), descending=True, stable=True)
    strata = ranked.view(m, groups)
    generator = torch.Generator().manual_seed(seed)
    dealt = [row[torch.randperm(groups, generator=generator)] for row in strata]
    return torch.stack(dealt, dim=1).flatten()  # [groups, m] -> [K]


GROUPINGS: Mapping[str, Rule] = MappingProxyType(
    {
        "consecutive": _consecutive,
        "random": _random,
        "balanced": _balanced,
    }
)
