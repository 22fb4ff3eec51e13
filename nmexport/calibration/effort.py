"""How long constants are learned, how, and from how much. Imports no torch: stages' keys do not.

What an effort means is a part of what it comes to: work folded under other settings is not up to
date.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from nmexport.sparsity.mitigation import learned_parts
from nmexport.sparsity.parts import PARTS, RANK, Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.choices import Effort
    from nmexport.recipe import SparsitySection


# Calibration samples that measurements of the fold stage take. Local errors and the static variance
# correction need few tokens: one number a layer.
ERROR_SAMPLES = 4
SENSITIVITY_SAMPLES = 16
DISTANCE_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """How long and on what; the defaults are the standard effort."""

    steps: int = 300
    batch: int = 4
    """Chunks a step."""
    length: int = 256
    """Tokens a chunk; longer samples are cut."""
    rate: float = 0.001
    """Largest step of a parameter of size 1, see Spread; warmed up, then falling as a cosine."""
    seed: int = 0
    parts: tuple[Part, ...] = PARTS
    rank: int = RANK
    """Rank of the low-rank compensation."""
    vocabulary: int = 8192
    """Tokens that the loss looks at in a step, three quarters of them the likeliest, the others
    drawn; the output embedding is much of a step's work."""
    disturbance: float = 0.2
    """Standard deviation of the logarithm of the factors that scores are multiplied by."""
    held_out: int = 8
    """Chunks that are never learned from, and show whether learning carries over."""
    block_chunks: int = 96
    """Chunks that a block learns from, where constants are learned block by block."""
    block_epochs: int = 4
    """How often it takes each."""
    block_rate: float = 0.001
    """As `rate`, of a block."""
    written: int = 512
    """Most chunks that the model writes for learning alone, rather than learn from some again."""


EFFORTS: Mapping[Effort, LearningSettings] = MappingProxyType(
    {
        "fast": LearningSettings(
            steps=80, rate=0.0015, written=64, block_chunks=48, block_epochs=2
        ),
        "standard": LearningSettings(),
        "thorough": LearningSettings(steps=1600, written=2048, block_chunks=128, block_epochs=12),
    }
)


def learning_settings(section: SparsitySection, seed: int) -> LearningSettings | None:
    """Return the recipe's learning settings; None where nothing is learned.

    Args:
        section: Mitigations, effort, rank.
        seed: The recipe's.
    """
    parts = learned_parts(section.mitigations)
    if not parts:
        return None
    return replace(EFFORTS[section.effort], parts=parts, rank=section.rank, seed=seed)
