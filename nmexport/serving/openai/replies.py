"""Bodies of OpenAI's answers: whole, in chunks, and errors."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import RequestError, ServerBusyError
from nmexport.serving.openai.requests import ParameterError

if TYPE_CHECKING:
    from nmexport.serving.openai.requests import Kind
    from nmexport.serving.request import Outcome

ErrorType = Literal["invalid_request_error", "server_error"]
END = b"data: [DONE]\n\n"
"""What closes every stream."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one request; all of its chunks have one id."""

    kind: Kind
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, text: str, outcome: Outcome) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}}
            if self.kind == "chat"
            else {"text": text}
        )
        return self._document(
            [self._choice(choice, outcome.finish_reason)], streamed=False, usage=usage(outcome)
        )

    def begin(self) -> dict[str, Any] | None:
        """The first chunk: who speaks; a completion has none."""
        if self.kind == "completion":
            return None
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk({"delta": {"content": text}} if self.kind == "chat" else {"text": text})

    def end(self, outcome: Outcome) -> dict[str, Any]:
        """The chunk that says why the text ends."""
        empty: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._chunk(empty, outcome.finish_reason)

    def counts(self, outcome: Outcome) -> dict[str, Any]:
        """The chunk after it, where numbers of tokens were asked for."""
        return self._document([], streamed=True, usage=usage(outcome))

    def _chunk(self, choice: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return self._document([self._choice(choice, reason)], streamed=True)

    def _choice(self, choice: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **choice, "logprobs": None, "finish_reason": reason}

    def _document(
        self,
        choices: list[dict[str, Any]],
        *,
        streamed: bool,
        usage: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        if self.kind == "completion":
            prefix, what = "cmpl", "text_completion"
        else:
            prefix, what = "chatcmpl", f"chat.completion{'.chunk' if streamed else ''}"
        return {
            "id": f"{prefix}-{self.token}",
            "object": what,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }


def usage(outcome: Outcome) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
    }


def models(name: str, created: int) -> dict[str, Any]:
    """The list of the one model that is served."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """The model that is served; `created` as in `Reply`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "nmexport"}


def event(document: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def error(
    message: str,
    *,
    kind: ErrorType = "invalid_request_error",
    parameter: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def error_of(problem: RequestError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for a request that is not taken."""
    message = " ".join(str(problem).splitlines())
    if isinstance(problem, ServerBusyError):
        return 503, error(message, kind="server_error", code="server_busy")
    parameter = problem.parameter if isinstance(problem, ParameterError) else None
    return 400, error(message, parameter=parameter)
