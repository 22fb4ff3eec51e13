"""Cuts text to learn from into chunks: which are learned from, which are held out, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nmexport.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nmexport.calibration.effort import LearningSettings

SEED_STRIDE = 1_000_003
"""Between the seeds of two runs: a prime, so that seeds of one run never meet those of another."""


@dataclass(frozen=True)
class Chunks:
    """Samples cut to the length of a step."""

    ids: torch.Tensor
    """`[chunks, length]`, learned from; kind by kind."""
    counts: tuple[int, ...]
    """How many of each kind."""
    held_out: torch.Tensor
    """`[held out, length]`"""


def split_chunks(samples: Sequence[torch.Tensor], settings: LearningSettings) -> Chunks:
    """Cut samples into chunks, seeded, and keep some of each kind back.

    Raises:
        CorpusError: if not even one batch is left to learn from.
    """
    kinds = [sample for sample in samples if len(sample)]
    length = chunk_length(kinds, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    learned, held_out = [], []
    for kind in kinds:
        whole = cut(kind, length)
        shuffled = whole[torch.randperm(len(whole), generator=generator)]
        held = min(settings.held_out // len(kinds), len(whole) // 8)
        held_out.append(shuffled[:held])
        learned.append(shuffled[held:])
    count = sum(len(sample) for sample in learned)
    if count < settings.batch:
        raise CorpusError(
            f"{count} chunks of {length} tokens are too few to learn from.",
            allowed=f"at least {settings.batch}, besides those that are held out",
            fix="use more --calib-samples",
        )
    return Chunks(torch.cat(learned), tuple(map(len, learned)), torch.cat(held_out))


def chunk_length(samples: Sequence[torch.Tensor], settings: LearningSettings) -> int:
    """Return the tokens of a chunk: the settings', or the shortest kind's length."""
    return min([settings.length, *(sample.shape[1] for sample in samples if len(sample))])


def cut(samples: torch.Tensor, length: int) -> torch.Tensor:
    """Cut `[samples, L]` into `[chunks, length]`; the rest of a sample is not used."""
    return samples[:, : samples.shape[1] // length * length].reshape(-1, length)


def without(samples: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Drop samples of `[N, L]` that begin with one of the windows `[W, l]`."""
    starts = samples[:, None, : windows.shape[1]]
    return samples[~(starts == windows[None]).all(dim=2).any(dim=1)]


def batch_of(step: int, counts: Sequence[int], settings: LearningSettings) -> torch.Tensor:
    """Choose the chunks of a step: `[batch]`.

    Kinds take turns; of one kind, every chunk comes once before any comes twice.

    Args:
        step: From 0.
        counts: Chunks of each kind, which stand one after another.
        settings: Batch and seed.
    """
    rows = []
    for slot in range(step * settings.batch, (step + 1) * settings.batch):
        kind, place = slot % len(counts), slot // len(counts)
        generator = torch.Generator().manual_seed(
            (settings.seed * len(counts) + kind) * SEED_STRIDE + place // counts[kind]
        )
        shuffled = torch.randperm(counts[kind], generator=generator)
        rows.append(sum(counts[:kind]) + int(shuffled[place % counts[kind]]))
    return torch.tensor(rows)
