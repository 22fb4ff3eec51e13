"""Reads bodies of OpenAI's requests for the text service.

A parameter is honoured, refused, or known not to change the text. None is dropped in silence: text
that was to be JSON, or to call a tool, would come back as any other text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import RequestError
from nmexport.generation.token_scores import MOST_LIKELIEST
from nmexport.json_reader import parse_json
from nmexport.serving.service import TextRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["chat", "completion"]

# Parameters that the service takes under the same name; the last two are ours.
_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "top_k",
    "repetition_penalty",
)
_LONGEST = ("max_completion_tokens", "max_tokens")
# Who asks, where it is kept, how it is billed.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# What this server does anyway; other values ask for what it does not.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_TEXTS: Mapping[Kind, str] = {"chat": "messages", "completion": "prompt"}
_SCORES: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("logprobs", "top_logprobs"),
    "completion": ("logprobs",),
}


class ParameterError(RequestError):
    """A parameter of a request cannot be taken."""

    def __init__(self, parameter: str, problem: str, *, allowed: str) -> None:
        """Name the parameter, as OpenAI's errors do."""
        self.parameter = parameter
        super().__init__(problem, allowed=allowed)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A client's request."""

    model: str
    text: TextRequest
    stream: bool
    include_usage: bool
    """A stream ends with the numbers of tokens."""


def read(body: bytes, kind: Kind) -> Asked:
    """Read a request.

    Args:
        body: JSON.
        kind: Which of the two endpoints it came to.

    Raises:
        RequestError: if it is no JSON object, or a parameter is unknown, of the wrong kind, or asks
            for what is not served.
    """
    try:
        document = parse_json(body)
    except ValueError as error:
        raise RequestError(f"The body is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestError("The body is no JSON object.")
    given = {name: value for name, value in document.items() if value is not None}
    _check_names(given, kind)
    model = given.get("model")
    if not isinstance(model, str):
        raise ParameterError("model", "The request names no model.", allowed="see /v1/models")
    stream = _flag(given, "stream")
    return Asked(
        model=model,
        text=_text_request(given, kind),
        stream=stream,
        include_usage=_include_usage(given, stream=stream),
    )


def _check_names(given: Mapping[str, Any], kind: Kind) -> None:
    known = {
        "model",
        "stream",
        "stream_options",
        _TEXTS[kind],
        *_OPTIONS,
        *_LONGEST,
        *_SCORES[kind],
    }
    for name, value in given.items():
        if name in known or name in _WITHOUT_EFFECT:
            continue
        if name not in _ONLY:
            raise ParameterError(name, f"Unknown parameter {name!r}.", allowed=_words(known))
        if not any(value == allowed and type(value) is type(allowed) for allowed in _ONLY[name]):
            allowed = " or ".join(json.dumps(choice) for choice in _ONLY[name])
            raise ParameterError(
                name, f"This server has no {name} {value!r}.", allowed=f"{allowed}, or left out"
            )


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ParameterError(name, f"{name} cannot be {value!r}.", allowed="true or false")
    return value


def _include_usage(given: Mapping[str, Any], *, stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise ParameterError(
            "stream_options",
            f"stream_options cannot be {options!r}.",
            allowed='{"include_usage": true}',
        )
    if options and not stream:
        raise ParameterError(
            "stream_options", "stream_options is for streams.", allowed="with stream true"
        )
    return _flag(options, "include_usage")


def _text_request(given: Mapping[str, Any], kind: Kind) -> TextRequest:
    values = {name: given[name] for name in _OPTIONS if name in given}
    longest = [name for name in _LONGEST if name in given]
    if len(longest) > 1:
        raise ParameterError(
            longest[0], f"{' and '.join(longest)} mean the same.", allowed="one of them"
        )
    for name in longest:
        values["max_tokens"] = given[name]
    scored = _chat_likeliest(given) if kind == "chat" else _likeliest(given, "logprobs")
    if kind == "chat":
        messages = _messages(given.get("messages"))
        return TextRequest(messages=messages, values=values, likeliest=scored)
    return TextRequest(text=_prompt(given.get("prompt")), values=values, likeliest=scored)


def _chat_likeliest(given: Mapping[str, Any]) -> int | None:
    """Return how many likeliest tokens a chat asks for; None for no scores."""
    named = _likeliest(given, "top_logprobs")
    if _flag(given, "logprobs"):
        return named or 0
    if named:
        raise ParameterError(
            "top_logprobs", "top_logprobs is for logprobs.", allowed="with logprobs true"
        )
    return None


def _likeliest(given: Mapping[str, Any], name: str) -> int | None:
    """Read a number of likeliest tokens; None where none is given."""
    value = given.get(name)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (is_number and 0 <= value <= MOST_LIKELIEST):
        return value
    raise ParameterError(
        name, f"{name} cannot be {value!r}.", allowed=f"a whole number, 0 to {MOST_LIKELIEST}"
    )


def _prompt(prompt: Any) -> str:
    texts = prompt if isinstance(prompt, list) else [prompt]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ParameterError(
            "prompt",
            f"prompt is {_brief(prompt)}.",
            allowed="one text; several are as many requests, token ids are not taken",
        )
    return texts[0]


def _messages(messages: Any) -> str:
    """Return the messages as JSON, each content as one text; roles are checked later."""
    if not isinstance(messages, list):
        raise ParameterError(
            "messages",
            f"messages is {_brief(messages)}.",
            allowed='a list such as [{"role": "user", "content": "Hello"}]',
        )
    return json.dumps(
        [_plain(message) if isinstance(message, dict) else message for message in messages]
    )


def _plain(message: Mapping[str, Any]) -> dict[str, object]:
    """Join content in parts, and drop keys that a client's objects fill with null.

    Templates ask whether a message has `tool_calls`, not what they are.
    """
    plain = {name: value for name, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(_part(part) for part in plain["content"])
    return plain


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise ParameterError(
        "messages", f"messages holds a part {_brief(part)}.", allowed="parts of the type text"
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."  # noqa: PLR2004  a line on a screen
