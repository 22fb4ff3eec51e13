"""One request: what it asks for, its progress, and who receives the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from nmexport.runtimes.chunks import LEAST_CHUNK, chunk_end
from nmexport.runtimes.session import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nmexport.generation.sampler import Sampler
    from nmexport.generation.stopping import StopFilter
    from nmexport.generation.text_stream import TextStream
    from nmexport.generation.token_scores import TokenScore

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request so far."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome(Usage):
    """How a request ended."""

    finish_reason: FinishReason


class Sink(Protocol):
    """Receives one request's text; called only from the scheduler's thread."""

    def text(self, piece: str, usage: Usage, scores: Sequence[TokenScore]) -> None:
        """Receive one more piece of text, with the usage so far.

        Args:
            piece: Empty only where scores are left at the end.
            usage: Tokens so far.
            scores: Of the tokens whose text begins in the pieces so far and that were not given
                yet; none where the request asks for none.
        """
        ...

    def done(self, outcome: Outcome) -> None:
        """The end."""
        ...

    def failed(self, problem: str) -> None:
        """The end, too."""
        ...

    def is_cancelled(self) -> bool:
        """Tell whether the client has gone."""
        ...

    def abandoned(self) -> None:
        """End a request that was cancelled."""
        ...


@dataclass(kw_only=True, eq=False)
class Request:
    """One request, from its arrival to its end."""

    prompt: NDArray[np.int64]
    """`[1, S]`."""
    max_tokens: int
    sampler: Sampler
    text: TextStream
    stop: StopFilter
    sink: Sink
    reserved_bytes: int
    arrived: float
    likeliest: int | None = None
    """How many likeliest tokens to name beside each that is drawn; None scores none."""
    prefilled: int = 0
    answer: list[int] = field(default_factory=list)
    """Tokens that were drawn and run."""
    produced: int = 0
    cache: Any = None
    scores: list[TokenScore] = field(default_factory=list)
    """Of tokens whose text the sink does not have yet."""
    decoded: int = 0
    """Characters of its answer."""
    given: int = 0
    """Those of them that the sink has."""
    last_token: int = -1
    last_time: float = field(default=0.0)
    is_counted: bool = False
    """True once its end is in the metrics, whatever its sink does then."""

    @property
    def prompt_tokens(self) -> int:
        return int(self.prompt.shape[1])

    @property
    def is_decoding(self) -> bool:
        return self.prefilled == self.prompt_tokens

    def work(self, tokens: NDArray[np.int64]) -> Work:
        """Return its part of a step, as the session takes it."""
        draws = self.is_decoding or self.prefilled + len(tokens) == self.prompt_tokens
        is_greedy = self.sampler.is_greedy
        return Work(
            self.cache,
            tokens,
            needs_logits=draws and (not is_greedy or self.likeliest is not None),
            goes_on=draws and is_greedy and self.produced + 1 < self.max_tokens,
        )

    @property
    def known(self) -> NDArray[np.int64]:
        """Return the tokens `[S]` that its cache holds."""
        return np.concatenate([self.prompt[0, : self.prefilled], self.answer]).astype(np.int64)

    def next_tokens(self, most: int) -> NDArray[np.int64]:
        """Return its part of a step: the last token, or a chunk of its prompt; may be empty."""
        if self.is_decoding:
            return np.asarray([self.last_token], np.int64)
        left = self.prompt[0, self.prefilled :]
        if most < min(len(left), LEAST_CHUNK):
            return left[:0]
        return left[: chunk_end(0, len(left), most)]

    def give(self, piece: str, *, is_end: bool = False) -> None:
        """Pass text on, with the scores of the tokens that begin in it.

        Tokens that a stop text cut off begin behind the last piece, and stay.
        """
        self.given += len(piece)
        begun = [
            score
            for score in self.scores
            if score.offset < self.given or (is_end and not self.stop.stopped)
        ]
        self.scores = self.scores[len(begun) :]
        if piece or begun:
            self.sink.text(piece, self.usage, begun)

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.produced)
