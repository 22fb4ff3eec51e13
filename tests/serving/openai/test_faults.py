"""What clients and machines do to a server, and that the rest of its clients do not notice."""

from __future__ import annotations

import contextlib
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest
from nmexport.serving import metrics as names

from tests.support.served import NAME, save_work
from tests.support.served_openai import CONTEXT, LONG, PROMPT, Counts, connect, served
from tests.support.triton_clients import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.serving.openai.front import Front


@pytest.fixture(scope="module")
def work(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    save_work(tiny_export, root, context=CONTEXT)
    return root


def complete(client: openai.OpenAI, prompt: str = PROMPT, max_tokens: int = 4) -> str:
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=max_tokens)
    return str(answer.choices[0].text)


def send_stream(front: Front, **options: Any) -> socket.socket:
    """Ask for a stream, and read nothing of it."""
    body = json.dumps({"model": NAME, "prompt": PROMPT, "stream": True, **options}).encode()
    connection = socket.create_connection(("127.0.0.1", front.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_a_thousand_requests_at_once_are_answered_or_told_to_come_back(work: Path) -> None:
    counts = Counts()
    settings = {"slots": "4", "queue": "64"}
    with served(work, counts, **settings) as (service, front), connect(front) as client:
        alone = complete(client)

        def ask(_: int) -> str | int:
            try:
                return complete(client)
            except openai.InternalServerError as error:
                return error.status_code

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(ask, range(1000)))
        assert set(answers) == {alone, 503}
        assert counts.of(names.REJECTED) == answers.count(503)
        assert counts.of(names.FINISHED) == 1 + answers.count(alone)
        wait_for(lambda: service.scheduler.running + service.scheduler.waiting == 0)
        assert complete(client) == alone


def test_who_does_not_read_holds_nobody_up(work: Path) -> None:
    with served(work, Counts()) as (service, front), connect(front) as client:
        alone = complete(client)
        with contextlib.closing(send_stream(front, max_tokens=LONG, logprobs=20)):
            wait_for(lambda: service.scheduler.running == 1)
            assert [complete(client) for _ in range(5)] == [alone] * 5
        wait_for(lambda: service.scheduler.running == 0)


def test_clients_that_are_killed_amid_their_streams_leave_nothing(work: Path) -> None:
    counts = Counts()
    with served(work, counts) as (service, front), connect(front) as client:
        alone = complete(client)
        gone = [send_stream(front, max_tokens=LONG) for _ in range(4)]
        wait_for(lambda: counts.of(names.GENERATED_TOKENS) > 8)
        for connection in gone:
            # As the system ends the connections of a process that is killed: with a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        wait_for(lambda: service.scheduler.running == 0)
        assert counts.of(names.CANCELLED) == 4
        assert complete(client) == alone


def test_a_prompt_may_fill_the_context_but_for_a_token(work: Path) -> None:
    with served(work, Counts()) as (service, front), connect(front) as client:
        whole = service.bundle.context_tokens

        def tokens_of(count: int) -> str:
            return "fox " * count

        first = client.completions.create(model=NAME, prompt=tokens_of(1), max_tokens=1)
        more = client.completions.create(model=NAME, prompt=tokens_of(11), max_tokens=1)
        assert first.usage is not None
        assert more.usage is not None
        each = (more.usage.prompt_tokens - first.usage.prompt_tokens) // 10
        fits = 1 + (whole - 1 - first.usage.prompt_tokens) // each
        answer = client.completions.create(model=NAME, prompt=tokens_of(fits), max_tokens=1)
        assert answer.usage is not None
        assert whole - each <= answer.usage.total_tokens <= whole
        with pytest.raises(openai.BadRequestError, match=f"{whole} tokens, the model's context"):
            client.completions.create(model=NAME, prompt=tokens_of(fits + each + 1), max_tokens=1)


def test_memory_that_runs_out_ends_what_asked_for_it(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts()
    with served(work, counts) as (service, front), connect(front) as client:
        alone = complete(client)
        session = service.scheduler._session
        step = session.step

        def starved(work: Any) -> Any:
            if any(len(one.tokens) > 1 for one in work):
                raise MemoryError
            return step(work)

        stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=800, stream=True)
        chunks = iter(stream)
        next(chunks)
        monkeypatch.setattr(session, "step", starved)
        with pytest.raises(openai.InternalServerError, match="failed on this request"):
            complete(client)
        monkeypatch.undo()
        assert complete(client) == alone
        *_, last = chunks
        assert last.choices[0].finish_reason == "length"
        assert counts.of(names.FAILED) == 1
