"""The subject of a verification: a build, and the text to measure it on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nmexport.runtimes.engine import read_engine
from nmexport.store.layers import model_phases

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import LatencySection, Recipe
    from nmexport.runtimes.engine import Engine
    from nmexport.store.folded import FoldedModel
    from nmexport.store.layers import ModelPhases

PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A build and its text."""

    recipe: Recipe
    source: ModelSource
    folded: FoldedModel
    engine_folder: Path
    """The artifact of the stage `engine`."""
    windows: NDArray[np.int64]
    """Evaluation text, `[W, L]` token ids."""
    environment: Environment
    progress: Progress

    @cached_property
    def engine(self) -> Engine:
        """The engine's description."""
        return read_engine(self.engine_folder)

    @cached_property
    def phases(self) -> ModelPhases:
        """When the model is sparse: the recipe's phases, unless linears got phases of their own."""
        return model_phases(self.folded.layers)

    @cached_property
    def prompts(self) -> NDArray[np.int64]:
        """`[B, P]`: as many prompts as the recipe wants, or as the windows give."""
        return prompts_from(self.windows, self.recipe.evaluation.prompts)


def prompts_from(windows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Cut up to `count` prompts of equal length from windows, and what follows each.

    Args:
        windows: `[W, L]` token ids.
        count: Prompts wanted.

    Returns:
        `[count or fewer, 32 or L]`.
    """
    length = min(PROMPT_TOKENS, windows.shape[1])
    pieces = [
        windows[:, start : start + length]
        for start in range(0, windows.shape[1] - length + 1, length)
    ]
    return np.concatenate(pieces)[:count]


def latency_tokens(
    windows: NDArray[np.int64], section: LatencySection
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return text to prefill `[1, S]` and to decode after it `[1, C]`; repeated if short."""
    text = np.resize(windows.reshape(-1), section.prefill_tokens + section.decode_context)
    prompt, context = np.split(text, [section.prefill_tokens])
    return prompt[None, :], context[None, :]
