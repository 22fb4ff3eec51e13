"""The scheduler on a session with slots, as on a GPU: every request's text is its solo text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.errors import RequestError
from nmexport.generation.options import GenerationOptions
from nmexport.serving import service
from nmexport.serving.request import Request
from nmexport.serving.service import TextRequest, TextService, limits_for, slots_wanted
from nmexport.serving.sharing import PromptSharing

from tests.serving.test_scheduler import ListSink, Recorder
from tests.support.served import save_package
from tests.support.slots import slot_session
from tests.support.solo_runs import prompt, scheduler_on, solo

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from nmexport.runtimes.session import Stepped, Work
    from nmexport.runtimes.slot_session import SlotSession
    from nmexport.serving.scheduler import Scheduler

    from tests.support.exported import Exported

SLOTS = 4
CONTEXT = 192


@pytest.fixture(scope="module")
def session(plain_export: Exported) -> Iterator[SlotSession]:
    with slot_session(plain_export.model, slots=SLOTS, tokens=CONTEXT) as one:
        yield one


def scheduler(session: SlotSession, **limits: int) -> Scheduler:
    known = {
        "context_tokens": CONTEXT,
        "cache_bytes": SLOTS * session.cache_bytes(CONTEXT),
        "slots": SLOTS,
        **limits,
    }
    return scheduler_on(session, Recorder(), **known)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_mix_gives_everyone_the_text_of_a_solo_run(
    session: SlotSession, data: st.DataObject
) -> None:
    one = scheduler(session, slots=data.draw(st.sampled_from([2, SLOTS]), "slots"))
    wanted: list[tuple[ListSink, list[int], int, float, int, bool]] = []
    for seed in range(data.draw(st.integers(1, 9), "requests")):
        text = prompt(data.draw(st.sampled_from([1, 2, 9, 16, 17, 40, 80]), "length"), seed)
        tokens = data.draw(st.integers(1, 10), "tokens")
        heat = data.draw(st.sampled_from([0.0, 0.0, 0.9]), "temperature")
        sink = ListSink()
        one.submit(
            text,
            GenerationOptions(max_tokens=tokens, temperature=heat, seed=seed),
            sink,
            likeliest=data.draw(st.sampled_from([None, None, 2]), "likeliest"),
        )
        leaves = data.draw(st.sampled_from([False, False, False, True]), "leaves")
        wanted.append((sink, text, tokens, heat, seed, leaves))
        for _ in range(data.draw(st.integers(0, 4), "steps before the next")):
            one.step()
        sink.cancelled = leaves
    for _ in range(1000):
        if not (one.running or one.waiting):
            break
        one.step()
    for sink, text, tokens, heat, seed, left in wanted:
        alone = solo(session, text, tokens, heat=heat, seed=seed)
        assert sink.problem is None
        assert alone.startswith(sink.all_text)
        assert sink.was_abandoned or sink.all_text == alone
        assert left or not sink.was_abandoned


def test_logits_are_asked_for_where_they_are_drawn_from_alone(
    session: SlotSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[bool]] = []
    step = session.step

    def noting(work: Sequence[Work]) -> list[Stepped]:
        asked.append([one.needs_logits for one in work])
        return step(work)

    monkeypatch.setattr(session, "step", noting)
    one = scheduler(session)
    options = [{"temperature": 0.0}, {"temperature": 0.7}, {"presence_penalty": 1.0}]
    for fields in options:
        one.submit(prompt(20, 1), GenerationOptions(max_tokens=2, seed=1, **fields), ListSink())
    one.submit(prompt(5, 1), GenerationOptions(max_tokens=1), ListSink(), likeliest=3)
    while one.running or one.waiting:
        one.step()
        if len(asked) == 1:
            assert asked[0] == [False] * 3 + [True], "only the last has its whole prompt in"
    assert asked[-1] == [False, True, True]


def test_a_failed_step_is_run_again_one_by_one(
    session: SlotSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = session.step
    broken = prompt(7, 3)

    def failing(work: Sequence[Work]) -> list[Stepped]:
        if any(one.tokens.tolist() == broken for one in work):
            raise RuntimeError("broken")
        return step(work)

    monkeypatch.setattr(session, "step", failing)
    one = scheduler(session)
    sinks = [ListSink() for _ in range(3)]
    for text, sink in zip([prompt(9, 1), broken, prompt(9, 2)], sinks, strict=True):
        one.submit(text, GenerationOptions(max_tokens=5), sink)
    while one.running or one.waiting:
        one.step()
    assert sinks[1].problem is not None
    monkeypatch.undo()
    for seed, sink in ((1, sinks[0]), (2, sinks[2])):
        assert sink.all_text == solo(session, prompt(9, seed), 5, heat=0.0, seed=0)


def test_more_slots_than_the_session_has_are_refused(session: SlotSession) -> None:
    with pytest.raises(RequestError, match="slots is 5"):
        scheduler(session, slots=5)


class _Prompt:
    """A prompt that is taken in chunks."""

    def __init__(self, length: int) -> None:
        self.left = np.arange(length)

    next_tokens = Request.next_tokens
    is_decoding = False
    prefilled = 0

    @property
    def prompt(self) -> np.ndarray:
        return self.left[None]


def test_chunks_are_whole_and_what_they_take_too_much_is_made_up_for() -> None:
    sharing = PromptSharing(16)
    long, short = _Prompt(40), _Prompt(5)

    def taken(room: int, *, holds_up: bool = True) -> list[int]:
        parts = sharing.parts([long, short], room, holds_up=holds_up)  # type: ignore[list-item]
        return [len(tokens) for _, tokens in parts]

    assert taken(0) == []
    assert taken(6) == [16]
    assert taken(6) == [], "four of the ten are left to make up for"
    assert taken(6) == [16]
    assert taken(6, holds_up=False) == [16, 5], "nobody waits"
    assert taken(6) == [16], "what was owed is forgotten"


def test_settings_decide_the_slots(session: SlotSession) -> None:
    room = slots_wanted({}, 4096)
    assert (room.slots, room.tokens, room.chunk, room.may_shrink) == (8, 4096, 256, True)
    numbers = {"slots": 2, "context_tokens": 128, "prefill_chunk": 32, "cache_bytes": 10**6}
    room = slots_wanted(numbers, 100)
    assert (room.slots, room.tokens, room.chunk, room.may_shrink) == (2, 100, 32, False)
    assert room.cache_bytes == 10**6
    limits = limits_for(session, {"queue": 3, "default_max_tokens": 9}, 4096)
    assert (limits.slots, limits.queue, limits.context_tokens) == (SLOTS, 3, CONTEXT)
    assert limits.cache_bytes == SLOTS * session.cache_bytes(1)


def test_a_service_runs_on_slots(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = save_package(tiny_export, tmp_path / "package")

    def opened(folder: Path, room: object, *, elsewhere: bool) -> SlotSession:
        assert elsewhere
        return slot_session(folder / "model.onnx", slots=SLOTS, tokens=CONTEXT)

    monkeypatch.setattr(service, "open_for_serving", opened)
    texts = [f"the same words and {index}" for index in range(9)]
    one = TextService.open(package, {})
    try:

        def answers(many: int) -> list[str]:
            sinks: list[ListSink] = []
            for index, text in enumerate(texts):
                heat = 0.8 * (index % 3 == 2)
                values = {"max_tokens": 3 + index, "temperature": heat, "seed": index}
                sinks.append(ListSink())
                one.submit(TextRequest(text=text, values=values), sinks[-1])
                if index % many == many - 1:
                    assert all(sink.ended.wait(60) for sink in sinks)
            assert all(sink.ended.wait(60) for sink in sinks)
            assert [sink.problem for sink in sinks] == [None] * len(texts)
            return [sink.all_text for sink in sinks]

        assert answers(9) == answers(1)
    finally:
        one.close()
