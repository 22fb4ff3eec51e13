"""What of OpenAI's requests is taken, and what is refused, each with its sentence."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nmexport.errors import RequestError, ServerBusyError
from nmexport.serving.openai.replies import error_of
from nmexport.serving.openai.requests import Kind, ParameterError, read

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Hello"}


def read_chat(**more: Any) -> Any:
    return read(json.dumps({**CHAT, **more}).encode(), "chat")


def read_text(**more: Any) -> Any:
    return read(json.dumps({**TEXT, **more}).encode(), "completion")


def test_options_arrive_by_the_names_that_the_service_has() -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a"], "top_k": 5}
    asked = read_text(**options, max_completion_tokens=7, user="me", logprobs=None, n=1)
    assert asked.text.values == {**options, "max_tokens": 7}
    assert asked.text.text == "Hello"
    assert not asked.stream
    assert read_text(prompt=["one"]).text.text == "one"


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    assert read_text().text.likeliest is None
    assert read_text(logprobs=0).text.likeliest == 0
    assert read_text(logprobs=5).text.likeliest == 5
    assert read_chat(logprobs=True).text.likeliest == 0
    assert read_chat(logprobs=True, top_logprobs=4).text.likeliest == 4
    assert read_chat(logprobs=False, top_logprobs=0).text.likeliest is None


def test_messages_lose_parts_and_nulls() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = read_chat(messages=[{"role": "user", "content": parts, "tool_calls": None}])
    assert json.loads(asked.text.messages) == CHAT["messages"]


@pytest.mark.parametrize(
    ("kind", "more", "parameter", "words"),
    [
        ("chat", {"model": None}, "model", "names no model"),
        ("chat", {"messages": None}, "messages", "messages is None"),
        ("chat", {"messages": "Hello"}, "messages", "messages is 'Hello'"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "parts of the type text",
        ),
        ("chat", {"n": 2}, "n", "no n 2. Allowed: 1, or left out"),
        ("chat", {"n": True}, "n", "no n True"),
        ("chat", {"logprobs": 3}, "logprobs", "logprobs cannot be 3. Allowed: true or false"),
        ("chat", {"top_logprobs": 2}, "top_logprobs", "is for logprobs"),
        (
            "chat",
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs",
            "cannot be 21. Allowed: a",
        ),
        ("chat", {"logprobs": True, "top_logprobs": True}, "top_logprobs", "cannot be True"),
        ("chat", {"tools": [{}]}, "tools", "no tools"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ("chat", {"surprise": 1}, "surprise", "Unknown parameter 'surprise'. Allowed:"),
        ("chat", {"prompt": "Hello"}, "prompt", "Unknown parameter 'prompt'"),
        ("chat", {"stream": 1}, "stream", "stream cannot be 1"),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
        ("chat", {"stream": True, "stream_options": 3}, "stream_options", "cannot be 3"),
        ("chat", {"max_tokens": 1, "max_completion_tokens": 1}, None, "mean the same"),
        ("completion", {"prompt": None}, "prompt", "prompt is None. Allowed: one text"),
        ("completion", {"prompt": ["a", "b"]}, "prompt", "as many requests"),
        ("completion", {"prompt": [1, 2, 3]}, "prompt", "token ids are not taken"),
        ("completion", {"logprobs": -1}, "logprobs", "cannot be -1. Allowed: a whole number"),
        ("completion", {"logprobs": True}, "logprobs", "cannot be True"),
        ("completion", {"top_logprobs": 2}, "top_logprobs", "Unknown parameter"),
        ("completion", {"best_of": 3}, "best_of", "no best_of 3"),
        ("completion", {"echo": True}, "echo", "no echo True"),
        ("completion", {"suffix": "end"}, "suffix", "no suffix 'end'"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line_that_names_it(
    kind: Kind, more: dict[str, Any], parameter: str | None, words: str
) -> None:
    document = {**(CHAT if kind == "chat" else TEXT), **more}
    with pytest.raises(ParameterError) as caught:
        read(json.dumps(document).encode(), kind)
    status, body = error_of(caught.value)
    assert status == 400
    assert words in body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"
    if parameter is not None:
        assert body["error"]["param"] == parameter


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="body is no JSON"):
        read(body, "chat")


def test_a_busy_server_is_an_error_to_try_again_on() -> None:
    status, body = error_of(ServerBusyError("The queue is full.", fix="wait"))
    assert status == 503
    assert body["error"]["type"] == "server_error"
    assert body["error"]["message"] == "The queue is full. Next: wait"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_NAMES = st.sampled_from(
    ["messages", "prompt", "stream", "stream_options", "n", "tools", "stop", "model", "max_tokens"]
)


@given(
    more=st.dictionaries(_NAMES | st.text(max_size=8), _JSON, max_size=4),
    kind=st.sampled_from(["chat", "completion"]),
)
def test_any_json_is_read_or_refused(more: dict[str, Any], kind: Kind) -> None:
    body = json.dumps({**(CHAT if kind == "chat" else TEXT), **more}).encode()
    with contextlib.suppress(RequestError):  # anything else is a fault
        asked = read(body, kind)
        assert (asked.text.text is None) == (kind == "chat")
