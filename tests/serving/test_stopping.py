"""How a server is told to stop: the variable, the signals, and what is in flight then."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from nmexport.errors import EnvironmentFault, ServerBusyError
from nmexport.serving.limits import Limits
from nmexport.serving.scheduler import SHUTTING_DOWN
from nmexport.serving.service import TextRequest, TextService
from nmexport.serving.stopping import DRAIN_SECONDS, DRAIN_VARIABLE, StopSignals, drain_seconds

from tests.serving.test_scheduler import ListSink, StuckSession, letters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    import numpy as np


def test_the_variable_says_how_long() -> None:
    assert drain_seconds({}) == DRAIN_SECONDS
    assert drain_seconds({DRAIN_VARIABLE: "0"}) == 0
    assert drain_seconds({DRAIN_VARIABLE: "7"}) == 7


@pytest.mark.parametrize("text", ["", "-1", "1.5", "²", "long"])
def test_a_variable_that_is_no_number_is_named(text: str) -> None:
    with pytest.raises(EnvironmentFault, match=DRAIN_VARIABLE):
        drain_seconds({DRAIN_VARIABLE: text})


# -- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_main_thread_is_not_in_python(number: int) -> None:
    heard = threading.Event()
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    with StopSignals(heard.set) as signals:
        os.kill(os.getpid(), number)
        assert heard.wait(10)
    assert not signals._thread.is_alive()
    assert {one: signal.getsignal(one) for one in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    signals.close()  # once more is no error


def test_other_signals_are_not_meant() -> None:
    def pass_by(_number: int, _frame: FrameType | None) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, pass_by)
    heard = threading.Event()
    try:
        with StopSignals(heard.set):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not heard.is_set()


def test_a_thread_that_cannot_listen_says_so(caplog: pytest.LogCaptureFixture) -> None:
    thread = threading.Thread(target=lambda: StopSignals(lambda: None).close())
    thread.start()
    thread.join(10)
    assert "only unloading drains" in caplog.text


# -- what is in flight ----------------------------------------------------------------------------


class Slow(StuckSession):
    """A token takes 10 ms, and none ends the text."""

    def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        time.sleep(0.01)
        return super().extend(cache, input_ids)


class Letters:
    """A tokenizer of ten letters."""

    longest_token = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        del add_special_tokens
        return ["abcdefghij".index(letter) for letter in text]

    decode = staticmethod(letters)


@pytest.fixture
def service(request: pytest.FixtureRequest) -> Iterator[TextService]:
    import types

    from nmexport.generation.options import GenerationOptions

    bundle: Any = types.SimpleNamespace(end_tokens=frozenset(), defaults=GenerationOptions())
    tokenizer: Any = Letters()
    limits = Limits(context_tokens=10_000, cache_bytes=10**9, slots=1)
    with TextService(Slow(), tokenizer, bundle, limits=limits, drain_seconds=request.param) as one:
        yield one


def ask(service: TextService, max_tokens: int) -> ListSink:
    sink = ListSink()
    service.submit(TextRequest(text="a", values={"max_tokens": max_tokens}), sink)
    return sink


@pytest.mark.parametrize("service", [60.0], indirect=True)
def test_draining_returns_at_once_and_lets_requests_end(service: TextService) -> None:
    sinks = [ask(service, 5), ask(service, 5)]
    before = time.monotonic()
    service.drain()
    service.drain()
    assert time.monotonic() - before < 5
    with pytest.raises(ServerBusyError, match=SHUTTING_DOWN):
        ask(service, 1)
    assert all(sink.ended.wait(20) for sink in sinks)
    assert [sink.all_text for sink in sinks] == ["fffff"] * 2
    service.close()
    assert not service._abort.is_alive()  # no thread waits for what is over


@pytest.mark.parametrize("service", [0.2], indirect=True)
def test_what_outlasts_the_draining_is_ended_with_an_error(service: TextService) -> None:
    sinks = [ask(service, 9000), ask(service, 9000)]
    before = time.monotonic()
    service.close()
    assert time.monotonic() - before < 30  # 90 s a text
    assert [sink.problem for sink in sinks] == [SHUTTING_DOWN] * 2
