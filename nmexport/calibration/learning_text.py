"""Lets the model write more text, where learning would reuse what there is too often.

Constants that learn from a few chunks many times serve those chunks: on SmolLM2, 480 steps over 128
chunks of its own text left other text at 1.83 times the dense perplexity, over a thousand at 1.72.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nmexport.calibration.learning_chunks import chunk_length, cut

if TYPE_CHECKING:
    from nmexport.calibration.checkpoint import Checkpoint
    from nmexport.calibration.corpus import SelfText
    from nmexport.calibration.effort import LearningSettings

_IDS = "ids"


def chunks_missing(corpus: torch.Tensor, own: torch.Tensor, settings: LearningSettings) -> int:
    """Return how many more own chunks a run wants; at most `settings.written`.

    Args:
        corpus: `[samples, length]` int64 token ids of text from elsewhere.
        own: The same of the model's own text; where there is none, it is not to write any.
        settings: Steps, batch, chunk length.
    """
    if not len(own):
        return 0
    kinds = 2 if len(corpus) else 1
    taken = math.ceil(settings.steps * settings.batch / kinds) + settings.held_out // kinds
    there = len(cut(own, chunk_length([corpus, own], settings)))
    return min(max(0, taken - there), settings.written)


def with_more_written(
    corpus: torch.Tensor,
    own: torch.Tensor,
    write: SelfText,
    *,
    settings: LearningSettings,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> torch.Tensor:
    """Add the model's own text, in chunks `[chunks, length]`, where there is too little.

    Args:
        corpus: `[samples, length]` int64 token ids of text from elsewhere.
        own: The same of the model's own text.
        write: Generates more.
        settings: Of the run.
        seed: Of what is generated.
        checkpoint: Keeps that for a run that goes on from a kill.

    Raises:
        ModelError: if the model's logits are not finite.
    """
    missing = chunks_missing(corpus, own, settings)
    if not missing:
        return own
    length = chunk_length([corpus, own], settings)
    written = _load_kept(checkpoint, (missing, length))
    if written is None:
        written = torch.from_numpy(write(missing, length, seed))
        if checkpoint is not None:
            checkpoint.save({_IDS: written}, {})
    return torch.cat([cut(own, length), written])


def _load_kept(checkpoint: Checkpoint | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return the text of an earlier run, if it is as much as is wanted."""
    saved = None if checkpoint is None else checkpoint.load()
    ids = None if saved is None else saved[0].get(_IDS)
    return ids if ids is not None and ids.shape == shape else None
