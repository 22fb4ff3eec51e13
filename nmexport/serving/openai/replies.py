"""Bodies of OpenAI's answers: whole, in chunks, and errors."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nmexport.errors import RequestError, ServerBusyError
from nmexport.serving.openai.requests import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nmexport.generation.token_scores import TokenScore
    from nmexport.serving.openai.events import Piece
    from nmexport.serving.openai.requests import Kind
    from nmexport.serving.request import Outcome

ErrorType = Literal["invalid_request_error", "server_error"]
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
END = b"data: [DONE]\n\n"
"""What closes every stream."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one request; all of its chunks have one id."""

    kind: Kind
    model: str
    token_text: Callable[[int], str]
    """Text of a token."""
    is_scored: bool = False
    """Tokens come with log probabilities."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, pieces: Sequence[Piece], outcome: Outcome) -> dict[str, object]:
        """Build the answer in one piece."""
        text = "".join(piece.text for piece in pieces)
        scores = [score for piece in pieces for score in piece.scores]
        choice: dict[str, object] = (
            {"message": {"role": "assistant", "content": text}}
            if self.kind == "chat"
            else {"text": text}
        )
        return self._document(
            [self._choice(choice, outcome.finish_reason, scores)],
            streamed=False,
            usage=usage(outcome),
        )

    def begin(self) -> dict[str, object] | None:
        """Build the first chunk, which names the role; a completion has none."""
        if self.kind == "completion":
            return None
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, piece: Piece) -> dict[str, object]:
        """Build a chunk with text."""
        text = piece.text
        choice: dict[str, object] = (
            {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        )
        return self._chunk(choice, scores=piece.scores)

    def end(self, outcome: Outcome) -> dict[str, object]:
        """Build the chunk that says why the text ends."""
        empty: dict[str, object] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._chunk(empty, outcome.finish_reason)

    def counts(self, outcome: Outcome) -> dict[str, object]:
        """Build the chunk with the numbers of tokens, where they were asked for."""
        return self._document([], streamed=True, usage=usage(outcome))

    def _chunk(
        self,
        choice: dict[str, object],
        reason: str | None = None,
        scores: Sequence[TokenScore] | None = None,
    ) -> dict[str, object]:
        return self._document([self._choice(choice, reason, scores)], streamed=True)

    def _choice(
        self, choice: dict[str, object], reason: str | None, scores: Sequence[TokenScore] | None
    ) -> dict[str, object]:
        scored = self._write_scores(scores) if self.is_scored and scores is not None else None
        return {"index": 0, **choice, "logprobs": scored, "finish_reason": reason}

    def _write_scores(self, scores: Sequence[TokenScore]) -> dict[str, object]:
        """Write log probabilities, in the form of the endpoint."""
        if self.kind == "chat":
            return {"content": [self._write_score(score) for score in scores], "refusal": None}
        return {
            "tokens": [self.token_text(score.token) for score in scores],
            "token_logprobs": [score.log_probability for score in scores],
            "top_logprobs": [
                # Of tokens with one text the likeliest is named.
                {self.token_text(token): value for token, value in reversed(score.likeliest)}
                for score in scores
            ],
            "text_offset": [score.offset for score in scores],
        }

    def _write_score(self, score: TokenScore) -> dict[str, object]:
        return {
            **self._token(score.token, score.log_probability),
            "top_logprobs": [self._token(token, value) for token, value in score.likeliest],
        }

    def _token(self, token: int, log_probability: float) -> dict[str, object]:
        text = self.token_text(token)
        # Part of a character has no text, and its bytes are not known here.
        known = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": log_probability, "bytes": known}

    def _document(
        self,
        choices: list[dict[str, object]],
        *,
        streamed: bool,
        usage: dict[str, int] | None = None,
    ) -> dict[str, object]:
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


def models(name: str, created: int) -> dict[str, object]:
    """Build the list of the one served model."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, object]:
    """Describe the served model; `created` as in `Reply`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "nmexport"}


def event(document: dict[str, object]) -> bytes:
    """Encode an event of a stream."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def error(
    message: str,
    *,
    kind: ErrorType = "invalid_request_error",
    parameter: str | None = None,
    code: str | None = None,
) -> dict[str, object]:
    """Build an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def error_of(problem: RequestError) -> tuple[int, dict[str, object]]:
    """Return HTTP status and body for a request that is refused."""
    message = " ".join(str(problem).splitlines())
    if isinstance(problem, ServerBusyError):
        return 503, error(message, kind="server_error", code="server_busy")
    parameter = problem.parameter if isinstance(problem, ParameterError) else None
    return 400, error(message, parameter=parameter)
