"""Beginnings that requests share, and how many tokens of prompts a step carries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nmexport.runtimes.session import Session
from nmexport.serving.pace import Pace
from nmexport.serving.prefixes import Prefixes


class Beginnings(Session):
    """The cache is the text itself; it can be cut."""

    vocabulary_size = 10
    cache_bytes_per_token = 1
    can_cut = True

    def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        raise NotImplementedError

    def beginning(self, cache: Any, length: int) -> Any:
        return cache[:length] if self.can_cut else None

    def close(self) -> None:
        pass


def text(*parts: int) -> np.ndarray:
    """For each part, 20 tokens of that number."""
    return np.repeat(np.asarray(parts, np.int64), 20)


def kept(*texts: np.ndarray, most: int = 1000) -> Prefixes:
    prefixes = Prefixes(Beginnings(), most)
    for one in texts:
        prefixes.keep(one, one)
    return prefixes


def test_the_longest_common_beginning_is_found() -> None:
    prefixes = kept(text(1, 2, 3), text(1, 4))
    length, cache = prefixes.find(text(1, 2, 5))
    assert length == 40
    np.testing.assert_array_equal(cache, text(1, 2))


def test_the_last_token_is_always_computed() -> None:
    length, _ = kept(text(1, 2)).find(text(1, 2))
    assert length == 39


@pytest.mark.parametrize("prompt", [text(7, 1), np.asarray([1] * 16), text(1)[:10]])
def test_too_little_is_not_worth_it(prompt: np.ndarray) -> None:
    assert kept(text(1, 2)).find(prompt) == (0, None)


def test_a_text_takes_the_place_of_its_own_beginning() -> None:
    prefixes = kept(text(1), text(1, 2), text(1))
    assert prefixes.bytes == 40


def test_what_was_not_used_for_longest_goes_first() -> None:
    prefixes = kept(text(1, 1), text(2, 2), most=100)
    prefixes.find(text(1, 1))
    prefixes.keep(text(3, 3), text(3, 3))
    assert [prefixes.find(text(n, n))[0] for n in (1, 2, 3)] == [39, 0, 39]
    prefixes.shrink(0)
    assert prefixes.bytes == 0
    assert prefixes.find(text(3, 3)) == (0, None)


def test_nothing_is_kept_of_a_session_that_cannot_cut() -> None:
    session = Beginnings()
    session.can_cut = False
    prefixes = Prefixes(session, 1000)
    prefixes.keep(text(1, 2), text(1, 2))
    assert prefixes.bytes == 0


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), max_size=12), st.integers(0, 200)
)
def test_bytes_are_those_of_what_is_held_and_within_the_limit(
    texts: list[list[int]], most: int
) -> None:
    prefixes = Prefixes(Beginnings(), most)
    for parts in texts:
        prefixes.keep(text(*parts), text(*parts))
        assert prefixes.bytes <= most
        length, cache = prefixes.find(text(*parts, 9))
        if cache is not None:
            np.testing.assert_array_equal(cache, text(*parts, 9)[:length])
    prefixes.shrink(0)
    assert prefixes.bytes == 0


def test_prompts_fill_steps_that_nobody_waits_for() -> None:
    assert Pace(most=256, slowdown_percent=50).budget(decoding=0) == 256


def test_a_step_is_lengthened_by_its_share_at_most() -> None:
    pace = Pace(most=256, slowdown_percent=50)
    assert pace.budget(decoding=4) == 0, "it is measured first"
    pace.observe(0.100, decoding=4, prompt_tokens=0)
    pace.observe(0.200, decoding=4, prompt_tokens=100)
    assert pace.budget(decoding=4) == 50
    for _ in range(50):
        pace.observe(0.400, decoding=8, prompt_tokens=0)
    assert pace.budget(decoding=8) == pytest.approx(200, abs=1)


def test_what_more_requests_cost_does_not_count_for_a_prompt() -> None:
    """Prompts that never end leave no step without them but the first of each count."""
    pace = Pace(most=256, slowdown_percent=80)
    pace.observe(0.064, decoding=0, prompt_tokens=64)
    for decoding in range(1, 9):
        step = 0.010 + 0.001 * decoding
        for _ in range(20):
            prompts = pace.budget(decoding=decoding)
            pace.observe(step + 0.001 * prompts, decoding=decoding, prompt_tokens=prompts)
        assert pace.budget(decoding=decoding) == pytest.approx(800 * step, abs=1)


@pytest.mark.parametrize(("most", "room"), [(256, 4), (2, 2)])
def test_new_requests_get_on_whatever_was_measured(most: int, room: int) -> None:
    pace = Pace(most=most, slowdown_percent=0)
    pace.observe(0.1, decoding=1, prompt_tokens=0)
    pace.observe(0.2, decoding=0, prompt_tokens=10)
    assert pace.budget(decoding=1) == room


def test_a_fixed_step_is_measured_once_for_any_number_of_requests() -> None:
    pace = Pace(most=256, slowdown_percent=100, is_fixed=True)
    assert pace.budget(decoding=3) == 0
    pace.observe(0.008, decoding=3, prompt_tokens=0)
    pace.observe(0.016, decoding=7, prompt_tokens=64)
    assert pace.budget(decoding=1) == pace.budget(decoding=8) == 64
