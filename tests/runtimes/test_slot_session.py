"""A session with slots, on a CPU: everyone's own bits, whoever else is there or was before."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.errors import ArtifactError, RequestError
from nmexport.runtimes.chunks import chunk_end
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.session import Work
from nmexport.runtimes.slots import SlotRoom, slots_for

from tests.support.exported import Exported, export_folder
from tests.support.slots import slot_session
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nmexport.runtimes.slot_session import SlotSession

CHUNK = 16
SLOTS = 4
TOLERANCE = 5e-6
"""Rounding of float32 sums in another order; logits are about 2."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model that sees a window of its past."""
    folder = tmp_path_factory.mktemp("slots")
    save_tiny_model(folder / "source", "mistral")
    (folder / "export").mkdir()
    return export_folder(folder / "source", folder / "export")


@pytest.fixture(scope="module")
def session(exported: Exported) -> Iterator[SlotSession]:
    with slot_session(exported.model, slots=SLOTS, chunk=CHUNK) as one:
        yield one


@pytest.fixture(scope="module", params=["windowed", "plain"])
def either(
    request: pytest.FixtureRequest, session: SlotSession, plain_export: Exported
) -> Iterator[SlotSession]:
    if request.param == "windowed":
        yield session
        return
    with slot_session(plain_export.model, slots=SLOTS, chunk=CHUNK) as one:
        yield one


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length)


def test_logits_are_those_of_the_exported_model(exported: Exported, session: SlotSession) -> None:
    prompts = tokens(3 * 40).reshape(3, 40)
    with OrtSession(exported.model) as whole:
        np.testing.assert_allclose(
            session.prefill(prompts), whole.prefill(prompts), atol=TOLERANCE, rtol=0
        )
        for seed in range(4):
            step = tokens(3, seed)[:, None]
            np.testing.assert_allclose(
                session.decode_step(step), whole.decode_step(step), atol=TOLERANCE, rtol=0
            )
    session.cache = None


class Answer:
    """One sequence: a prompt, and tokens that follow whatever the model says, or its likeliest."""

    def __init__(self, prompt: np.ndarray, length: int, *, greedy: bool, seed: int) -> None:
        self.seed = seed
        self.prompt = prompt
        self.length = length
        self.greedy = greedy
        self.forced = tokens(length, seed + 1000)
        self.done = 0
        self.cache: object | None = None
        self.drawn: list[int] = []
        self.logits: list[np.ndarray | None] = []

    @property
    def ended(self) -> bool:
        return len(self.drawn) == self.length

    def work(self) -> Work:
        if self.done < len(self.prompt):
            end = chunk_end(self.done, len(self.prompt), CHUNK)
            part = self.prompt[self.done : end]
        else:
            part = np.array(self.drawn[-1:], np.int64)
        draws = self.done + len(part) >= len(self.prompt)
        goes_on = draws and self.greedy and len(self.drawn) + 1 < self.length
        return Work(self.cache, part, needs_logits=draws and not self.greedy, goes_on=goes_on)

    def take(self, count: int, logits: np.ndarray | None, cache: object, token: int) -> None:
        self.cache = cache
        self.done += count
        if self.done < len(self.prompt):
            return
        self.drawn.append(token if self.greedy else int(self.forced[len(self.drawn)]))
        self.logits.append(None if logits is None else logits.copy())


def advance(session: SlotSession, answers: list[Answer]) -> None:
    work = [one.work() for one in answers]
    for one, part, result in zip(answers, work, session.step(work), strict=True):
        one.take(len(part.tokens), *result)
        assert part.needs_logits == (result.logits is not None)


def finish(session: SlotSession, answer: Answer) -> Answer:
    while not answer.ended:
        advance(session, [answer])
    answer.cache = None
    return answer


def assert_same(got: Answer, alone: Answer) -> None:
    count = len(got.drawn)
    assert got.drawn == alone.drawn[:count]
    for mine, theirs in zip(got.logits, alone.logits, strict=False):
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_sequence_gets_its_solo_bits(either: SlotSession, data: st.DataObject) -> None:
    """Any mix of arrivals, cancellations, lengths and ways to draw; slots are used again."""
    draw = data.draw

    def answer(seed: int) -> Answer:
        rng = np.random.default_rng(seed)
        return Answer(
            tokens(int(rng.choice([1, 2, 15, 16, 17, 18, 33, 64, 130])), seed),
            int(rng.integers(1, 9)),
            greedy=bool(rng.integers(2)),
            seed=seed,
        )

    seeds = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10, unique=True), "arrivals")
    waiting = [answer(seed) for seed in seeds]
    running: list[Answer] = []
    through: list[Answer] = []
    while waiting or running:
        while waiting and len(running) < SLOTS and (not running or draw(st.booleans(), "arrives")):
            running.append(waiting.pop(0))
        paused = draw(st.sampled_from([0, 0, 0, 1]), "paused") if len(running) > 1 else 0
        advance(either, running[paused:])
        for one in list(running):
            if one.ended or draw(st.sampled_from([False] * 9 + [True]), "leaves"):
                running.remove(one)
                one.cache = None
                through.append(one)
    for one in through:
        assert_same(one, finish(either, answer(one.seed)))


def test_a_solo_run_is_one_by_the_sessions_other_methods(session: SlotSession) -> None:
    prompt = tokens(70, 3)
    answer = finish(session, Answer(prompt, 6, greedy=True, seed=3))
    chosen, cache = session.next_tokens(None, prompt[None])
    drawn = [int(chosen[0])]
    for _ in range(5):
        chosen, cache = session.next_tokens(cache, chosen[:, None])
        drawn.append(int(chosen[0]))
    assert drawn == answer.drawn
    del cache
    logits, cache = session.extend_last(None, prompt[None])
    assert int(logits[0, 0].argmax()) == answer.drawn[0]
    del cache


def test_what_a_longer_sequence_left_changes_nothing(exported: Exported) -> None:
    with slot_session(exported.model, slots=1, chunk=CHUNK) as session:
        fresh = finish(session, Answer(tokens(20, 1), 8, greedy=False, seed=1))
        finish(session, Answer(tokens(150, 2), 30, greedy=True, seed=2))
        again = finish(session, Answer(tokens(20, 1), 8, greedy=False, seed=1))
        assert_same(again, fresh)


def test_a_step_ahead_is_not_taken_for_another_sequences(exported: Exported) -> None:
    """The next sequence in a slot may have the same token at the same place as the last one."""
    with slot_session(exported.model, slots=1, chunk=CHUNK) as session:
        first = Work(None, tokens(20, 1), needs_logits=False, goes_on=True)
        (ahead,) = session.step([first])
        token = np.array([ahead.token], np.int64)
        del ahead
        (begun,) = session.step([Work(None, tokens(20, 2))])  # draws: nothing is started ahead
        (got,) = session.step([Work(begun.cache, token)])
        del begun
        assert got.logits is not None
        logits = got.logits
        del got
        (begun,) = session.step([Work(None, tokens(20, 2))])
        (wanted,) = session.step([Work(begun.cache, token)])
        np.testing.assert_array_equal(logits, wanted.logits)


def test_the_next_step_runs_before_it_is_asked_for(exported: Exported) -> None:
    with slot_session(exported.model, slots=2, chunk=CHUNK) as session:
        runs: list[int] = []
        run = session._steps._run
        session._steps._run = lambda rows: (runs.append(len(rows)), run(rows))[1]  # type: ignore[method-assign]
        answers = [Answer(tokens(9, seed), 5, greedy=True, seed=seed) for seed in range(2)]
        for _ in range(5):
            advance(session, answers)
        assert runs == [2, 2, 2, 2], "each begun by the step before, none for nobody"


def test_slots_are_free_again_when_their_caches_are_dropped(session: SlotSession) -> None:
    prompt = tokens(5)[None]
    caches = [session.next_tokens(None, prompt)[1] for _ in range(SLOTS)]
    with pytest.raises(ArtifactError, match=f"All {SLOTS} slots"):
        session.next_tokens(None, prompt)
    caches.pop()
    gc.collect()
    caches.append(session.next_tokens(None, prompt)[1])
    assert session.limits.batch == SLOTS


def test_a_full_slot_is_refused_and_harms_nobody(exported: Exported) -> None:
    with slot_session(exported.model, slots=2, tokens=64, chunk=CHUNK) as session:
        _, full = session.next_tokens(None, tokens(64)[None])
        with pytest.raises(ArtifactError, match="65 tokens are more"):
            session.next_tokens(full, tokens(1)[None])
        beside = Answer(tokens(20, 4), 6, greedy=False, seed=4)
        alone = Answer(tokens(20, 4), 6, greedy=False, seed=4)
        finish(session, beside)
        del full
        assert_same(beside, finish(session, alone))


def test_memory_decides_how_much_fits(session: SlotSession) -> None:
    model = session._model
    each = SLOTS * model.bytes_per_token
    room = {"slots": SLOTS, "tokens": 400}
    assert slots_for(SlotRoom(**room, cache_bytes=400 * each), model) == 400
    with pytest.raises(RequestError, match="cache_bytes"):
        slots_for(SlotRoom(**room, cache_bytes=399 * each), model)
    assert slots_for(SlotRoom(**room, cache_bytes=399 * each, may_shrink=True), model) == 384
    with pytest.raises(RequestError, match="4 slots of 400 tokens"):
        slots_for(SlotRoom(**room, cache_bytes=100 * each, may_shrink=True), model)
