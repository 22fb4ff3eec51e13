"""OpenAI's own client against the API, over a tiny model without Triton."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from nmexport.errors import EnvironmentFault
from nmexport.generation.loop import generate
from nmexport.generation.options import GenerationOptions
from nmexport.generation.tokenizer import Tokenizer
from nmexport.runtimes.opening import open_on_onnxruntime
from nmexport.serving import metrics as names
from nmexport.serving.openai import opening
from scipy.special import log_softmax

from tests.support.served import NAME, save_work
from tests.support.served_openai import CONTEXT, LONG, PROMPT, Counts, connect, served
from tests.support.triton_clients import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nmexport.serving.openai.front import Front

MESSAGES: Any = [{"role": "user", "content": "fox"}]


@pytest.fixture(scope="module")
def work(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openai")
    save_work(tiny_export, root, context=CONTEXT)
    return root


@pytest.fixture(scope="module")
def counts() -> Counts:
    return Counts()


@pytest.fixture(scope="module")
def front(work: Path, counts: Counts) -> Iterator[Front]:
    with served(work, counts) as (_, one):
        yield one


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    with connect(front) as one:
        yield one


# -- text -----------------------------------------------------------------------------------------


def test_text_is_that_of_generate_streamed_or_not(client: openai.OpenAI, work: Path) -> None:
    expected = "".join(generate(work, PROMPT, GenerationOptions(max_tokens=24)))
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24)
    assert whole.object == "text_completion"
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == 24 + whole.usage.prompt_tokens
    stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=24, stream=True)
    chunks = list(stream)
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_is_the_template_s_text(client: openai.OpenAI, work: Path) -> None:
    expected = "".join(generate(work, "fox", GenerationOptions(max_tokens=4), chat=True))
    whole = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=4)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *said, counted = chunks
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == expected
    assert said[-1].choices[0].finish_reason == "length"
    assert counted.choices == []
    assert counted.usage == whole.usage
    # The client's own object goes back as a message, with all the nulls in it.
    more = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(model=NAME, messages=more, max_tokens=2).choices


def test_seed_temperature_and_stop_hold(client: openai.OpenAI) -> None:
    def draw(**options: Any) -> str:
        asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 16, **options}
        return str(client.completions.create(**asked).choices[0].text)

    warm = {"temperature": 0.9, "top_p": 0.9, "extra_body": {"top_k": 50}}
    assert draw(**warm, seed=7) == draw(**warm, seed=7) != draw(**warm, seed=8)
    text = draw()
    assert draw(stop=[text[4:6]]) == text[: text.index(text[4:6])]


def test_many_streams_at_once_are_those_of_one(front: Front) -> None:
    def run(index: int) -> str:
        with connect(front) as one:
            stream = one.completions.create(
                model=NAME,
                prompt=f"{PROMPT} {index}",
                max_tokens=6 + index % 5,
                temperature=0.8,
                seed=index,
                stream=True,
            )
            return "".join(chunk.choices[0].text for chunk in stream)

    solo = [run(index) for index in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(run, range(12))) == solo


def test_log_probabilities_are_those_of_the_model_s_logits(
    client: openai.OpenAI, work: Path
) -> None:
    whole = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, logprobs=3)
    choice = whole.choices[0]
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert "".join(scores.tokens) == choice.text
    # Half a character comes out with the other half, and begins where that does.
    begins = [len("".join(scores.tokens[:index])) for index in range(len(scores.tokens))]
    whole_before = [not text.endswith("\N{REPLACEMENT CHARACTER}") for text in scores.tokens]
    assert scores.text_offset is not None
    for index, offset in enumerate(scores.text_offset):
        assert offset == begins[index] or (offset < begins[index] and not whole_before[index - 1])
    (bundle,) = (work / "package" / "current").glob("model_repository/*/1")
    tokens, cache = Tokenizer(bundle).encode(PROMPT), None
    with open_on_onnxruntime(bundle, elsewhere=True) as session:
        for score, likeliest in zip(scores.token_logprobs, scores.top_logprobs, strict=True):
            logits, cache = session.extend(cache, np.asarray([tokens]))
            expected = log_softmax(logits[0, -1].astype(np.float64))
            tokens = [int(expected.argmax())]
            assert score == expected.max()
            # Tokens of the same text, halves of characters, are one: the likeliest of them.
            assert max(likeliest.values()) == score
            assert set(likeliest.values()) <= set(np.sort(expected)[-3:].tolist())


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_s_log_probabilities_go_with_its_text(
    client: openai.OpenAI, *, stream: bool
) -> None:
    def ask(**options: Any) -> tuple[str, list[Any]]:
        asked: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 8, **options}
        answer: Any = client.chat.completions.create(**asked, stream=stream)
        if not stream:
            choice = answer.choices[0]
            return choice.message.content, choice.logprobs.content
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        return text, [
            score for chunk in chunks if chunk.logprobs for score in chunk.logprobs.content
        ]

    text, scores = ask(logprobs=True, top_logprobs=2)
    assert "".join(score.token for score in scores) == text
    for score in scores:  # half a character has no bytes here
        is_whole = "\N{REPLACEMENT CHARACTER}" not in score.token
        assert score.bytes == (list(score.token.encode()) if is_whole else None)
    # Greedy: the first of the likeliest is what was drawn.
    assert all(score.top_logprobs[0].logprob == score.logprob for score in scores)
    assert all(len(score.top_logprobs) == 2 for score in scores)
    # What a stop text cuts off is not scored.
    cut, fewer = ask(logprobs=True, stop=[text[3:5]])
    assert cut == text[: text.index(text[3:5])]
    assert [score.token for score in fewer] == [score.token for score in scores[: len(fewer)]]
    assert len("".join(score.token for score in fewer[:-1])) < len(cut)


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "nmexport"


def test_the_asynchronous_client_streams_too(front: Front, work: Path) -> None:
    import asyncio

    async def run() -> str:
        url = f"http://127.0.0.1:{front.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any") as one:
            stream = await one.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=9, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(run()) == "".join(generate(work, PROMPT, GenerationOptions(max_tokens=9)))


# -- errors ---------------------------------------------------------------------------------------


def test_another_model_is_404(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.completions.create(model="gpt", prompt=PROMPT),
        lambda: client.models.retrieve("some/gpt"),
    ):
        with pytest.raises(openai.NotFoundError, match=rf"no model '.*gpt' here. Allowed: {NAME}"):
            ask()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": "warm"}, "temperature cannot be 'warm'"),
        ({"top_p": 2}, "top_p 2"),
        ({"stop": ["a"] * 40}, "stop"),
        ({"max_tokens": 5000}, "Too long"),
        ({"logprobs": 21}, "logprobs cannot be 21"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "a" * 1_000_000}, "Too long"),
    ],
)
def test_a_wrong_request_is_400_and_counted(
    client: openai.OpenAI, counts: Counts, options: dict[str, Any], words: str, *, stream: bool
) -> None:
    before = counts.of(names.REJECTED)
    asked = {"model": NAME, "prompt": PROMPT, **options}
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.completions.create(**asked, stream=stream)
    assert caught.value.type == "invalid_request_error"
    assert counts.of(names.REJECTED) == before + 1


def test_paths_methods_and_bodies_that_are_not_ours(front: Front) -> None:
    def ask(method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, json.load(answer)["error"]

    assert ask("POST", "/v1/embeddings")[0] == 404
    status, error = ask("GET", "/v1/completions")
    assert (status, error["message"]) == (405, "There is no GET /v1/completions here.")
    assert ask("POST", "/v1/completions", b"{")[0] == 400


def test_a_full_queue_is_503_until_there_is_room(work: Path) -> None:
    counts = Counts()
    with served(work, counts, slots="1", queue="1") as (service, front), connect(front) as client:
        held = [
            client.completions.create(model=NAME, prompt=PROMPT, max_tokens=LONG, stream=True)
            for _ in range(2)
        ]
        with pytest.raises(openai.InternalServerError, match="queue is full") as caught:
            client.completions.create(model=NAME, prompt=PROMPT, max_tokens=2)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        held[1].close()  # it waits, and is told apart from the one that runs
        wait_for(lambda: service.scheduler.waiting == 0)
        assert service.scheduler.running == 1
        held[0].close()
        wait_for(lambda: service.scheduler.running + service.scheduler.waiting == 0)
        assert client.completions.create(model=NAME, prompt=PROMPT, max_tokens=2).choices
        assert counts.of(names.CANCELLED) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(work: Path, *, stream: bool) -> None:
    counts = Counts()
    with served(work, counts) as (service, front):
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
        body = {"model": NAME, "prompt": PROMPT, "max_tokens": LONG, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body))
        wait_for(lambda: counts.of(names.GENERATED_TOKENS) > 0)
        connection.close()
        wait_for(lambda: service.scheduler.running == 0)
        assert counts.of(names.CANCELLED) == 1
        assert counts.of(names.FINISHED) == 0


def test_a_stop_ends_streams_with_an_error_and_takes_no_more(work: Path) -> None:
    with served(work, Counts()) as (service, front), connect(front) as client:
        stream = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=LONG, stream=True)
        next(iter(stream))
        service.scheduler.abort()
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(model=NAME, prompt=PROMPT)


def test_closing_waits_for_no_idle_connection(work: Path) -> None:
    with served(work, Counts()) as (_, front), connect(front) as client:
        client.models.list()
        began = time.monotonic()
        front.close()
        assert time.monotonic() - began < 1.5
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


# -- opening --------------------------------------------------------------------------------------


def test_the_environment_says_whether_and_where(
    work: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(work, Counts()) as (service, front):

        def open_front(text: str) -> Any:
            return opening.open_front({opening.ADDRESS_VARIABLE: text}, service, Counts())

        assert open_front("") is None
        for wrong in ("9000", "localhost:", ":9000", "localhost:http"):
            with pytest.raises(EnvironmentFault, match="HOST:PORT"):
                open_front(wrong)
        with pytest.raises(EnvironmentFault, match=f"port {front.port}: .*in use"):
            open_front(f"127.0.0.1:{front.port}")
        monkeypatch.setattr(opening, "find_spec", lambda _: None)
        assert open_front("127.0.0.1:0") is None
        assert "nmexport[serve]" in caplog.text
