"""The scheduler: who runs when, what each request gets, and that neighbours change nothing."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import RequestError, ServerBusyError
from nmexport.generation.options import GenerationOptions
from nmexport.runtimes.chunks import chunk_end
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.session import Session
from nmexport.serving import metrics as names
from nmexport.serving.limits import Limits
from nmexport.serving.request import Outcome, Usage
from nmexport.serving.scheduler import SHUTTING_DOWN, Scheduler

from tests.support.toy_lm import VOCABULARY, expected_logits, save_toy_lm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nmexport.generation.token_scores import TokenScore

END = 9


class CountingSession(Session):
    """After token n comes n + 1; the cache is the tokens so far."""

    vocabulary_size = 10
    cache_bytes_per_token = 100

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.broken_on: int | None = None

    def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        self.calls.append(input_ids[0].tolist())
        if self.broken_on in input_ids:
            raise RuntimeError("broken")
        logits = np.eye(10, dtype=np.float32)[(input_ids + 1) % 10]
        return logits, [*(cache or []), *input_ids[0].tolist()]

    def close(self) -> None:
        pass


class ListSink:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.usages: list[Usage] = []
        self.scores: list[TokenScore] = []
        self.outcome: Outcome | None = None
        self.problem: str | None = None
        self.cancelled = False
        self.was_abandoned = False
        self.ended = threading.Event()

    def text(self, piece: str, usage: Usage, scores: Sequence[TokenScore]) -> None:
        assert piece or scores
        self.pieces.append(piece)
        self.scores.extend(scores)
        self.usages.append(usage)

    def done(self, outcome: Outcome) -> None:
        assert not self.ended.is_set()
        self.outcome = outcome
        self.ended.set()

    def failed(self, problem: str) -> None:
        assert not self.ended.is_set()
        self.problem = problem
        self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def abandoned(self) -> None:
        self.was_abandoned = True
        self.ended.set()

    @property
    def all_text(self) -> str:
        return "".join(self.pieces)


class Recorder:
    """Metrics in dictionaries."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self.values: dict[str, float] = {}
        self.observed: dict[str, list[float]] = {}

    def add(self, name: str, amount: float = 1.0) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def set(self, name: str, value: float) -> None:
        self.values[name] = value

    def observe(self, name: str, value: float) -> None:
        self.observed.setdefault(name, []).append(value)


def letters(ids: Sequence[int]) -> str:
    return "".join("abcdefghij"[token] for token in ids)


def scheduler(session: Any = None, **limits: int) -> Scheduler:
    known = {
        "context_tokens": 50,
        "cache_bytes": 10_000,
        "slots": 2,
        "queue": 2,
        "prefill_chunk": 4,
    }
    return Scheduler(
        session or CountingSession(),
        decode=letters,
        end_tokens=frozenset({END}),
        limits=Limits(**{**known, **limits}),
        default_max_tokens=6,
        metrics=Recorder(),
    )


def submit(one: Scheduler, prompt: Sequence[int], **options: Any) -> ListSink:
    sink = ListSink()
    one.submit(prompt, GenerationOptions(**options), sink)
    return sink


def run(one: Scheduler, steps: int = 200) -> None:
    for _ in range(steps):
        if not (one.running or one.waiting):
            return
        one.step()
    pytest.fail("it never ends")


def recorded(one: Scheduler) -> Recorder:
    recorder = one._metrics._metrics  # type: ignore[attr-defined]
    assert isinstance(recorder, Recorder)
    return recorder


# -- one request ----------------------------------------------------------------------------------


def test_text_ends_at_the_end_token_and_counts() -> None:
    one = scheduler()
    sink = submit(one, [3, 4], max_tokens=20)
    run(one)
    assert sink.pieces == ["f", "g", "h", "i"]
    assert sink.outcome == Outcome(finish_reason="stop", prompt_tokens=2, completion_tokens=4)
    assert sink.usages == [
        Usage(prompt_tokens=2, completion_tokens=count) for count in (1, 2, 3, 4)
    ]
    counts = recorded(one).counts
    assert counts[names.PROMPT_TOKENS] == 2
    assert counts[names.GENERATED_TOKENS] == 4
    assert counts[names.FINISHED] == 1
    assert len(recorded(one).observed[names.NEXT_WAIT]) == 4  # the end token took its time, too
    assert recorded(one).values == {
        names.RUNNING: 0,
        names.WAITING: 0,
        names.CACHE_BYTES: 0,
        names.PREFIX_BYTES: 0,
    }


@pytest.mark.parametrize(("asked", "given"), [(3, 3), (None, 6)])
def test_text_ends_at_max_tokens(asked: int | None, given: int) -> None:
    one = scheduler()
    sink = submit(one, [0], max_tokens=asked)
    run(one)
    assert sink.outcome is not None
    assert (sink.outcome.finish_reason, sink.outcome.completion_tokens) == ("length", given)
    assert sink.all_text == "bcdefg"[:given]


def test_stop_text_across_tokens_is_never_shown() -> None:
    one = scheduler()
    sink = submit(one, [0], max_tokens=8, stop=("def",))
    run(one)
    assert sink.all_text == "bc"
    assert sink.outcome is not None
    assert sink.outcome.finish_reason == "stop"


def test_text_held_back_for_a_stop_text_comes_at_the_end() -> None:
    one = scheduler()
    sink = submit(one, [0], max_tokens=3, stop=("dx",))
    run(one)
    assert sink.pieces == ["b", "c", "d"]


class StuckSession(CountingSession):
    """Token 5, whatever came before."""

    def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        _, cache = super().extend(cache, input_ids)
        return np.eye(10, dtype=np.float32)[np.full_like(input_ids, 5)], cache


@pytest.mark.parametrize(
    ("options", "text"),
    [({}, "fff"), ({"presence_penalty": 2.0}, "fab"), ({"frequency_penalty": 0.6}, "ffa")],
)
def test_penalties_reach_the_sampler(options: dict[str, float], text: str) -> None:
    one = scheduler(StuckSession())
    sink = submit(one, [3], max_tokens=3, **options)
    run(one)
    assert sink.all_text == text


# -- many -----------------------------------------------------------------------------------------


def test_a_long_prompt_comes_in_chunks_between_the_others_tokens() -> None:
    session = CountingSession()
    one = scheduler(session)
    running = submit(one, [0], max_tokens=8)
    one.step()
    one.step()
    session.calls.clear()
    submit(one, list(range(8)) + [0] * 3, max_tokens=1)
    for _ in range(3):
        one.step()
    assert session.calls == [[2], [0, 1, 2, 3], [3], [4, 5, 6, 7], [4], [0, 0, 0]]
    assert running.all_text == "bcdef"


def test_oldest_first_and_none_overtakes() -> None:
    one = scheduler(slots=1)
    sinks = [submit(one, [0], max_tokens=2) for _ in range(2)]
    one.step()
    one.step()
    assert sinks[0].outcome is not None
    assert sinks[1].pieces == []
    run(one)
    assert sinks[1].all_text == "bc"
    assert len(recorded(one).observed[names.QUEUE_TIME]) == 2


def test_a_request_waits_for_memory_and_so_do_those_behind_it() -> None:
    one = scheduler(slots=3, queue=3, cache_bytes=1000)
    first = submit(one, [0], max_tokens=5)  # 600 bytes
    large = submit(one, [0], max_tokens=9)  # 1000
    small = submit(one, [0], max_tokens=1)  # 200
    one.step()
    assert (one.running, one.waiting) == (1, 2)
    assert recorded(one).values[names.CACHE_BYTES] == 600
    run(one)
    assert all(sink.outcome is not None for sink in (first, large, small))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_lm(tmp_path_factory.mktemp("toy") / "model.onnx")


def test_neighbours_change_nothing_on_a_real_session(toy: Path) -> None:
    prompts = [[1 + (3 * index + step) % 8 for step in range(1 + index * 2)] for index in range(9)]
    options = [
        {"max_tokens": 3 + index, "temperature": 0.7 * (index % 3), "seed": index}
        for index in range(9)
    ]
    with OrtSession(toy, threads=1) as session:

        def texts(slots: int, chunk: int) -> list[str]:
            one = Scheduler(
                session,
                decode=lambda ids: "".join(chr(65 + token) for token in ids),
                end_tokens=frozenset({0}),
                limits=Limits(
                    context_tokens=60, cache_bytes=10**6, slots=slots, prefill_chunk=chunk
                ),
            )
            sinks = [
                submit(one, prompt, **given) for prompt, given in zip(prompts, options, strict=True)
            ]
            run(one, 1000)
            return [sink.all_text for sink in sinks]

        alone = texts(slots=1, chunk=64)
        assert texts(slots=9, chunk=2) == alone
        assert len(set(alone)) > 5
        greedy = expected_logits(np.array([prompts[0]]))[0, -1].argmax()
        assert ord(alone[0][0]) - 65 == greedy % VOCABULARY


def test_padding_changes_bits_and_so_requests_are_not_padded_into_a_batch(
    tiny_export: Path,
) -> None:
    lengths = (5, 6, 8, 11, 17)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, size=size) for size in lengths]
    ids, mask = np.zeros((2, len(prompts), max(lengths)), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = prompt
        mask[row, -len(prompt) :] = 1
    # The dense model: no channel is chosen there, the difference is the runtime's attention alone.
    with OrtSession(tiny_export / "dense" / "model.onnx", threads=1) as session:
        alone = np.stack([session.prefill(prompt[None])[0, -1] for prompt in prompts])
        together = session.extend(None, ids, mask)[0][:, -1]
    np.testing.assert_allclose(together, alone, atol=1e-4)  # the mask works
    assert (together != alone).any()


def test_extending_leaves_the_sessions_own_cache_alone(toy: Path) -> None:
    with OrtSession(toy, threads=1) as session:
        session.prefill(np.array([[1, 2, 3]]))
        _, other = session.extend(None, np.array([[7, 8]]))
        session.extend(other, np.array([[9]]))
        own = session.decode_step(np.array([[4]]))
        np.testing.assert_allclose(
            own[0, -1], expected_logits(np.array([[1, 2, 3, 4]]))[0, -1], atol=1e-5
        )
        assert session.cache_bytes_per_token == 2 * 4 * 4


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_slot_within_one_step() -> None:
    session = CountingSession()
    one = scheduler(session, slots=1)
    gone, next_one = submit(one, [0], max_tokens=40), submit(one, [5], max_tokens=2)
    one.step()
    gone.cancelled = True
    session.calls.clear()
    one.step()
    assert session.calls == [[5]]  # not one more token for whom nobody waits
    assert gone.was_abandoned
    assert gone.outcome is None
    run(one)
    assert next_one.all_text == "gh"
    assert recorded(one).counts[names.CANCELLED] == 1


def test_a_cancelled_request_leaves_the_queue() -> None:
    one = scheduler(slots=1)
    first, gone = submit(one, [0], max_tokens=40), submit(one, [5])
    gone.cancelled = True
    one.step()
    assert gone.was_abandoned
    assert (one.running, one.waiting) == (1, 0)
    first.cancelled = True
    run(one)


def test_a_failure_ends_one_request_alone() -> None:
    session = CountingSession()
    session.broken_on = 5
    one = scheduler(session)
    doomed, well = submit(one, [4], max_tokens=5), submit(one, [6], max_tokens=2)
    run(one)
    assert doomed.all_text == "f"
    assert doomed.problem is not None
    assert "failed" in doomed.problem
    assert well.all_text == "hi"
    assert recorded(one).counts[names.FAILED] == 1
    assert one._reserved == 0


def broken(*_: object) -> Any:
    raise ValueError("broken")


@pytest.mark.parametrize(
    ("method", "how"),
    [("text", names.FAILED), ("done", names.FINISHED), ("is_cancelled", names.FAILED)],
)
def test_a_sink_that_breaks_ends_its_request_alone_and_once(
    monkeypatch: pytest.MonkeyPatch, method: str, how: str
) -> None:
    one = scheduler()
    bad, well = submit(one, [0]), submit(one, [6], max_tokens=2)
    monkeypatch.setattr(bad, method, broken)
    run(one)
    assert bad.problem
    assert well.all_text == "hi"
    counts = recorded(one).counts
    assert counts[how] == (2 if how == names.FINISHED else 1)
    assert counts.get(names.FINISHED, 0) + counts.get(names.FAILED, 0) == 2
    assert one._reserved == 0


def test_a_waiting_client_that_cannot_be_asked_leaves_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = scheduler(slots=1)
    first, bad = submit(one, [0], max_tokens=2), submit(one, [5])
    monkeypatch.setattr(bad, "is_cancelled", broken)
    one.step()
    assert bad.problem is not None
    assert "way to the client" in bad.problem
    assert one.waiting == 0
    run(one)
    assert first.all_text == "bc"


def test_metrics_that_break_are_told_once_and_cost_no_request(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = scheduler()
    for method in ("add", "set", "observe"):
        monkeypatch.setattr(recorded(one), method, broken)
    sink = submit(one, [0], max_tokens=3)
    run(one)
    assert sink.all_text == "bcd"
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "prompt is empty"),
        ([0] * 45, {"max_tokens": 6}, "Too long: 45 prompt tokens"),
        ([0] * 50, {}, "Too long"),
        ([0], {"max_tokens": 40}, "cache would take"),
    ],
)
def test_over_a_limit(prompt: list[int], options: dict[str, Any], words: str) -> None:
    one = scheduler(cache_bytes=4000 if "cache" in words else 10_000)
    with pytest.raises(RequestError, match=words):
        submit(one, prompt, **options)
    assert one.waiting == 0


def test_a_full_queue_refuses_and_takes_again() -> None:
    one = scheduler(slots=1, queue=1)
    sinks = [submit(one, [0], max_tokens=1)]
    one.step()
    sinks = [submit(one, [0], max_tokens=3)]
    one.step()
    sinks.append(submit(one, [0], max_tokens=1))
    with pytest.raises(ServerBusyError, match="queue is full"):
        submit(one, [0])
    run(one)
    sinks.append(submit(one, [0], max_tokens=1))
    run(one)
    assert all(sink.outcome for sink in sinks)


def test_whoever_waits_for_room_gets_it_or_may_leave() -> None:
    one = scheduler(slots=1, queue=0)
    first, second, third = submit(one, [0], max_tokens=3), ListSink(), ListSink()
    options = GenerationOptions(max_tokens=1)
    waits = threading.Thread(target=one.submit, args=([0], options, second), kwargs={"wait": True})
    waits.start()
    time.sleep(0.05)
    assert waits.is_alive()
    run(one)
    waits.join(5)
    assert first.outcome
    assert one.waiting == 1
    third.cancelled = True
    one.submit([0], options, third, wait=True)
    assert third.was_abandoned
    run(one)
    assert second.outcome


def test_closing_sends_away_whoever_waits_for_room() -> None:
    one = scheduler(slots=1, queue=0)
    submit(one, [0], max_tokens=3)
    timer = threading.Timer(0.05, one.close)
    timer.start()
    with pytest.raises(ServerBusyError, match=SHUTTING_DOWN):
        one.submit([0], GenerationOptions(max_tokens=1), ListSink(), wait=True)


def test_a_burst_is_no_way_around_the_limits() -> None:
    one = scheduler(slots=2, queue=2)
    for _ in range(4):
        submit(one, [0], max_tokens=3)
    with pytest.raises(RequestError, match="0 requests run, 4 wait"):
        submit(one, [0])
    one.step()
    with pytest.raises(RequestError, match="2 requests run, 2 wait"):
        submit(one, [0])
    run(one)
    submit(one, [0])


@pytest.mark.parametrize("name", ["slots", "prefill_chunk", "context_tokens", "cache_bytes"])
def test_limits_under_which_nothing_runs(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        scheduler(**{name: 0})


def test_a_chunk_never_leaves_one_token_alone() -> None:
    for total in range(1, 40):
        for chunk in range(2, 9):
            start, sizes = 0, []
            while start < total:
                end = chunk_end(start, total, chunk)
                sizes.append(end - start)
                start = end
            assert sum(sizes) == total
            assert max(sizes) <= chunk + 1
            assert total == 1 or 1 not in sizes


# -- the thread -----------------------------------------------------------------------------------


def test_closing_lets_requests_end_and_takes_no_more() -> None:
    one = scheduler()
    thread = threading.Thread(target=one.serve)
    thread.start()
    sinks = [submit(one, [0], max_tokens=8) for _ in range(2)]
    one.close()
    with pytest.raises(RequestError, match="shutting down"):
        submit(one, [0])
    thread.join(10)
    assert not thread.is_alive()
    assert [sink.all_text for sink in sinks] == ["bcdefghi"] * 2


def test_aborting_ends_what_is_in_flight() -> None:
    class Slow(StuckSession):
        def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
            time.sleep(0.01)
            return super().extend(cache, input_ids)

    one = scheduler(Slow(), slots=1)
    thread = threading.Thread(target=one.serve)
    thread.start()
    sinks = [submit(one, [0], max_tokens=40) for _ in range(2)]
    time.sleep(0.05)
    one.abort()
    thread.join(10)
    assert not thread.is_alive()
    assert all(sink.problem is not None and "shutting down" in sink.problem for sink in sinks)


def test_a_step_that_fails_ends_what_is_in_flight_and_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = scheduler(slots=1)
    monkeypatch.setattr(one, "step", broken)
    lost = [submit(one, [0]) for _ in range(2)]
    thread = threading.Thread(target=one.serve)
    thread.start()
    assert all(sink.ended.wait(10) for sink in lost)
    assert all(sink.problem is not None and "failed on a step" in sink.problem for sink in lost)
    monkeypatch.undo()
    next_one = submit(one, [0], max_tokens=2)
    assert next_one.ended.wait(10)
    one.close()
    thread.join(10)
    assert not thread.is_alive()
    assert next_one.all_text == "bc"
    assert recorded(one).counts == {
        names.FAILED: 2, names.FINISHED: 1, names.PROMPT_TOKENS: 1, names.GENERATED_TOKENS: 2,
    }  # fmt: skip
