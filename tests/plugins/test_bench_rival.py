"""The measurement beside llama.cpp: what a side of ours runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nmexport.runtimes.session import Session

from tests.support.plugin_build import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "plugins" / "bench" / "rival.py"


class Counting(Session):
    """Its cache is the number of tokens in it."""

    vocabulary_size = 4

    def __init__(self) -> None:
        self.met: list[int] = []

    def close(self) -> None:
        """Hold nothing."""

    def extend(self, cache: Any | None, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        self.met.append(cache or 0)
        tokens = input_ids.shape[1]
        return np.zeros((1, tokens, self.vocabulary_size), np.float32), (cache or 0) + tokens


@pytest.mark.parametrize("sequences", [1, 3])
def test_every_turn_decodes_from_the_same_beginning(sequences: int) -> None:
    rival = load_script(SCRIPT)
    session = Counting()
    side = rival.Ours(session)
    for _ in range(2):
        session.met.clear()
        assert len(side.decode(sequences)) == rival.STEPS
        wanted = [rival.BEGINNING + step for step in range(rival.STEPS) for _ in range(sequences)]
        assert session.met == wanted


def test_a_prompt_begins_anew() -> None:
    session = Counting()
    side = load_script(SCRIPT).Ours(session)
    session.met.clear()
    assert len(side.prompt()) == 1
    assert session.met == [0]
