"""Text for learning: how much is missing, that it is written once, and that none stays none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from nmexport.calibration.checkpoint import Checkpoint
from nmexport.calibration.effort import EFFORTS, LearningSettings
from nmexport.calibration.learning_chunks import split_chunks
from nmexport.calibration.learning_text import chunks_missing, with_more_written

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.calibration.text_sources import TokenIds

# Takes 40 chunks of each of two kinds, and holds 2 back.
SETTINGS = LearningSettings(steps=20, batch=4, length=8, held_out=4, written=100)
NONE = torch.empty((0, 16), dtype=torch.int64)


class Author:
    """Writes rows of one number, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, samples: int, length: int, seed: int) -> TokenIds:
        self.asked.append((samples, length, seed))
        return np.full((samples, length), 1000 + len(self.asked), dtype=np.int64)


def samples(count: int, length: int = 16) -> torch.Tensor:
    return torch.arange(count * length).view(count, length)


@pytest.mark.parametrize(
    ("corpus", "own", "missing"),
    [
        (samples(50), samples(5), 42 - 10),  # two chunks a sample
        (samples(50), samples(21), 0),
        (samples(50), samples(40), 0),
        (NONE, samples(5), 84 - 10),  # its own text is all there is
        (NONE, samples(1, 8), 84 - 1),
        (samples(50, 4), samples(5), 42 - 20),  # chunks are as long as the shortest sample
        (samples(50), NONE, 0),  # it is not to write any
    ],
)
def test_what_a_run_would_take_twice_is_missing(
    corpus: torch.Tensor, own: torch.Tensor, missing: int
) -> None:
    assert chunks_missing(corpus, own, SETTINGS) == missing


def test_there_is_a_limit() -> None:
    few = LearningSettings(steps=20, batch=4, length=8, written=7)
    assert chunks_missing(samples(50), samples(5), few) == 7


def test_with_what_was_written_no_chunk_is_learned_from_twice() -> None:
    corpus, own, write = samples(50), samples(5), Author()
    longer = with_more_written(corpus, own, write, settings=SETTINGS, seed=7)
    assert write.asked == [(32, 8, 7)]
    assert torch.equal(longer[:10].reshape(5, 16), own)
    assert (longer[10:] == 1001).all()
    assert split_chunks([corpus, longer], SETTINGS).counts[1] >= 20 * 4 // 2


@pytest.mark.parametrize("own", [NONE, samples(40)])
def test_nothing_is_written_where_nothing_is_missing(own: torch.Tensor) -> None:
    write = Author()
    assert with_more_written(samples(50), own, write, settings=SETTINGS, seed=0) is own
    assert not write.asked


def test_a_run_that_goes_on_reads_what_it_had_written(tmp_path: Path) -> None:
    write, kept = Author(), Checkpoint(tmp_path / "text.safetensors", identity="a")

    def longer(identity: str = "a", count: int = 5) -> torch.Tensor:
        checkpoint = Checkpoint(kept.path, identity=identity)
        return with_more_written(
            samples(50), samples(count), write, settings=SETTINGS, seed=0, checkpoint=checkpoint
        )

    first = longer()
    assert torch.equal(longer(), first)
    assert len(write.asked) == 1
    assert longer(count=6).shape[0] == first.shape[0]  # other text was too little by another number
    assert len(write.asked) == 2
    kept.path.write_bytes(b"torn")
    longer()
    longer(identity="b")
    assert len(write.asked) == 4


def test_longer_efforts_may_write_more() -> None:
    assert EFFORTS["fast"].written < EFFORTS["standard"].written < EFFORTS["thorough"].written
