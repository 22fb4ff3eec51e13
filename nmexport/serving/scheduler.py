"""Continuous batching: requests share one session, step by step, and come and go at any step.

A step takes every running request one token further and the oldest new one a chunk of its prompt
further. So a long prompt holds the others up by a chunk, not by its length.

Each request is run as a batch of its own, on its own cache. Sequences of unequal length, padded
into one batch, get other bits than alone, since the runtime's attention then sums over padding too;
a mask near a tie flips, and logits move as far as `test_padding_moves_logits` says. Sequences of
equal length would be exact, but those of requests that come and go hardly ever are. A batch of one
is exact by construction, and batch 1 is where sparse decode gains (two tokens together meet three
quarters of the rows, four nearly all of them). Chunks of a prompt give the same bits as the whole
prompt.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from nmexport.errors import RequestError, ServerBusyError
from nmexport.generation.sampler import Sampler
from nmexport.generation.stopping import StopFilter
from nmexport.generation.text_stream import TextStream
from nmexport.serving import metrics as names
from nmexport.serving.metrics import Harmless, Metrics, NoMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nmexport.generation.options import GenerationOptions
    from nmexport.runtimes.session import Session

FinishReason = Literal["stop", "length"]

DEFAULT_MAX_TOKENS = 256
SHUTTING_DOWN = "the server is shutting down"
_SEE_LOG = "the server's log says why"
_LEAST = {"queue": 0, "prefill_chunk": 2}
_SWEEP_SECONDS = 0.25
"""How often waiting requests are asked whether their client is still there."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes on."""

    context_tokens: int
    """Prompt and output of one request together: the model's context length."""
    cache_bytes: int
    """Limit on the caches of all running requests together."""
    slots: int = 8
    """Requests that run at a time."""
    queue: int = 128
    """Requests that may wait for a slot."""
    prefill_chunk: int = 64
    """Tokens of a prompt in one step: what a new request may hold the running ones up by."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run.

        Raises:
            RequestError: naming the limit.
        """
        for name, value in vars(self).items():
            least = _LEAST.get(name, 1)
            if value < least:
                raise RequestError(f"The limit {name} is {value}.", allowed=f"at least {least}")


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
    """Receiver of one request's text; called from the scheduler's thread alone."""

    def text(self, piece: str, usage: Usage) -> None:
        """One more piece, not empty, and what it took to get here."""
        ...

    def done(self, outcome: Outcome) -> None:
        """The end."""
        ...

    def failed(self, problem: str) -> None:
        """The end, too."""
        ...

    def is_cancelled(self) -> bool:
        """Tell whether nobody waits for the text any more."""
        ...

    def abandoned(self) -> None:
        """The end of a request that was cancelled."""
        ...


@dataclass(kw_only=True, eq=False)
class _Request:
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
    prefilled: int = 0
    produced: int = 0
    cache: Any = None
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

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.produced)


class Scheduler:
    """Runs requests on a session; `submit` from any thread, `step` from one."""

    def __init__(
        self,
        session: Session,
        *,
        decode: Callable[[Sequence[int]], str],
        end_tokens: frozenset[int],
        limits: Limits,
        default_max_tokens: int = DEFAULT_MAX_TOKENS,
        metrics: Metrics | None = None,
    ) -> None:
        """Take over a session.

        Args:
            session: Nobody else may run it.
            decode: Token ids to text, special tokens left out.
            end_tokens: Tokens that end a text.
            limits: How much to take on.
            default_max_tokens: For requests that do not say.
            metrics: Where measurements go.
        """
        self._session = session
        self._decode = decode
        self._ends = end_tokens
        self.limits = limits
        self._default_max_tokens = default_max_tokens
        self._metrics: Metrics = Harmless(metrics or NoMetrics())
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._reserved = 0
        self._closing = False
        self._aborting = False
        self._swept = 0.0
        self._changed = threading.Condition()

    # -- from any thread -------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests without one."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        sink: Sink,
        *,
        wait: bool = False,
    ) -> None:
        """Queue a request.

        Args:
            prompt: Token ids.
            options: How its text is drawn.
            sink: Where its text goes.
            wait: Wait until the queue has room; a client that goes away meanwhile is dropped.

        Raises:
            RequestError: if it is over a limit.
            ServerBusyError: if the queue is full, or the server is shutting down.
        """
        request = self._admissible(prompt, options, sink)
        if wait and not self._wait_for_room(sink):
            self._abandon(request)
            return
        with self._changed:
            if self._closing:
                raise ServerBusyError(f"No request is taken: {SHUTTING_DOWN}.")
            if not self._has_room():
                raise ServerBusyError(
                    f"The queue is full: {len(self._running)} requests run, "
                    f"{len(self._waiting)} wait.",
                    allowed=f"{self.limits.slots} that run, {self.limits.queue} that wait",
                    fix="try again later, or raise the server's limit `queue`",
                )
            self._waiting.append(request)
            self._metrics.set(names.WAITING, len(self._waiting))
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Whoever waits counts too: a free slot is theirs at the next step."""
        return len(self._running) + len(self._waiting) < self.limits.slots + self.limits.queue

    def _wait_for_room(self, sink: Sink) -> bool:
        """Wait until there is room or the server closes; False once the client is gone."""
        while True:
            with self._changed:
                if self._closing or self._has_room():
                    return True
                self._changed.wait(_SWEEP_SECONDS)
            if sink.is_cancelled():
                return False

    def _admissible(
        self, prompt: Sequence[int], options: GenerationOptions, sink: Sink
    ) -> _Request:
        if not prompt:
            raise RequestError("The prompt is empty.", allowed="at least one token")
        room = self.limits.context_tokens - len(prompt)
        max_tokens = options.max_tokens
        if max_tokens is None:
            max_tokens = max(1, min(self._default_max_tokens, room))
        if max_tokens > room:
            raise RequestError(
                f"Too long: {len(prompt)} prompt tokens and max_tokens {max_tokens} together.",
                allowed=f"{self.limits.context_tokens} tokens, the model's context",
                fix="shorten the prompt or ask for fewer tokens",
            )
        reserved = (len(prompt) + max_tokens) * self._session.cache_bytes_per_token
        if reserved > self.limits.cache_bytes:
            raise RequestError(
                f"Too long: the request's cache would take {reserved / 1e6:.0f} MB.",
                allowed=f"{self.limits.cache_bytes / 1e6:.0f} MB, all that the server has",
                fix="ask for fewer tokens, or raise the server's limit `cache_bytes`",
            )
        return _Request(
            prompt=np.asarray([prompt], dtype=np.int64),
            max_tokens=max_tokens,
            sampler=Sampler(
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                seed=options.seed_or_new,
                repetition_penalty=options.repetition_penalty,
                presence_penalty=options.presence_penalty,
                frequency_penalty=options.frequency_penalty,
                prompt=prompt,
            ),
            text=TextStream(self._decode),
            stop=StopFilter(options.stop),
            sink=sink,
            reserved_bytes=reserved,
            arrived=time.monotonic(),
        )

    def close(self) -> None:
        """Take no more requests; `serve` returns once those in flight have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Take no more, and end everything in flight with an error after this step."""
        with self._changed:
            self._closing = self._aborting = True
            self._changed.notify_all()

    # -- the scheduler's thread ------------------------------------------------------------------

    def serve(self) -> None:
        """Step until `close`, sleeping while there is nothing to do.

        A step that fails ends what is in flight: this thread is the only one that could answer.
        """
        while self._wait_for_work():
            try:
                if self._aborting:
                    self._fail_all(SHUTTING_DOWN)
                else:
                    self.step()
            except Exception:
                logging.getLogger(__name__).exception("a step failed")
                self._fail_all(f"the server failed on a step; {_SEE_LOG}")

    def _wait_for_work(self) -> bool:
        """Sleep until there is some; False where there will be no more."""
        with self._changed:
            while not (self._running or self._waiting or self._closing):
                self._changed.wait()
            return bool(self._running or self._waiting)

    def step(self) -> None:
        """Drop who went away, let in who fits, decode one token each, prefill one chunk."""
        self._drop_cancelled()
        self._admit()
        decoding = [request for request in self._running if request.is_decoding]
        for request in decoding:
            self._advance(request, self._decode_one)
        prefilling = next((request for request in self._running if not request.is_decoding), None)
        if prefilling is not None:
            self._advance(prefilling, self._prefill_chunk)

    def _drop_cancelled(self) -> None:
        for request in list(self._running):
            self._drop_if_cancelled(request)
        now = time.monotonic()
        if now - self._swept < _SWEEP_SECONDS:
            return
        self._swept = now
        with self._changed:
            waiting = list(self._waiting)
        for request in waiting:
            self._drop_if_cancelled(request)

    def _drop_if_cancelled(self, request: _Request) -> None:
        try:
            is_cancelled = request.sink.is_cancelled()
        except Exception:
            logging.getLogger(__name__).exception("a client cannot be asked whether it waits")
            self._fail(request, f"the way to the client failed; {_SEE_LOG}")
        else:
            if is_cancelled:
                self._abandon(request)

    def _admit(self) -> None:
        """Give slots to those who waited longest; none overtakes one that is too large for now."""
        now = time.monotonic()
        with self._changed:
            while self._waiting and len(self._running) < self.limits.slots:
                request = self._waiting[0]
                if self._reserved + request.reserved_bytes > self.limits.cache_bytes:
                    break
                self._waiting.popleft()
                self._running.append(request)
                self._reserved += request.reserved_bytes
                self._metrics.observe(names.QUEUE_TIME, (now - request.arrived) * 1e3)
        self._show()

    def _advance(self, request: _Request, work: Callable[[_Request], None]) -> None:
        """Do a request's part of a step; what goes wrong there ends this request alone."""
        try:
            work(request)
        except Exception:
            logging.getLogger(__name__).exception("a request failed")
            self._fail(request, f"the model failed on this request; {_SEE_LOG}")

    def _prefill_chunk(self, request: _Request) -> None:
        start = request.prefilled
        end = chunk_end(start, request.prompt_tokens, self.limits.prefill_chunk)
        logits, request.cache = self._session.extend(request.cache, request.prompt[:, start:end])
        request.prefilled = end
        self._metrics.add(names.PROMPT_TOKENS, end - start)
        if request.is_decoding:
            self._accept(request, logits[0, -1])

    def _decode_one(self, request: _Request) -> None:
        token = np.asarray([[request.last_token]], dtype=np.int64)
        logits, request.cache = self._session.extend(request.cache, token)
        self._accept(request, logits[0, -1])

    def _accept(self, request: _Request, logits: NDArray[np.float32]) -> None:
        """Draw a request's next token from logits `[V]`, and return the text it completes."""
        token = request.sampler(logits)
        now = time.monotonic()
        if request.last_token < 0:
            self._metrics.observe(names.FIRST_WAIT, (now - request.arrived) * 1e3)
        else:
            self._metrics.observe(names.NEXT_WAIT, (now - request.last_time) * 1e3)
        request.last_token, request.last_time = token, now
        if token in self._ends:
            self._finish(request, "stop")
            return
        request.produced += 1
        self._metrics.add(names.GENERATED_TOKENS)
        piece = request.stop.push(request.text.push(token))
        if piece:
            request.sink.text(piece, request.usage)
        if request.stop.stopped:
            self._finish(request, "stop")
        elif request.produced == request.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: _Request, reason: FinishReason) -> None:
        rest = request.stop.push(request.text.flush()) + request.stop.flush()
        if rest:
            request.sink.text(rest, request.usage)
        # The slot is free before the client learns of the end, and may ask for the next.
        self._leave(request, names.FINISHED)
        request.sink.done(
            Outcome(
                finish_reason="stop" if request.stop.stopped else reason,
                prompt_tokens=request.prompt_tokens,
                completion_tokens=request.produced,
            )
        )

    def _fail_all(self, problem: str) -> None:
        with self._changed:
            left = [*self._running, *self._waiting]
        for request in left:
            self._fail(request, problem)

    def _fail(self, request: _Request, problem: str) -> None:
        self._leave(request, names.FAILED)
        with contextlib.suppress(Exception):  # whoever waits may be what failed
            request.sink.failed(problem)

    def _abandon(self, request: _Request) -> None:
        self._leave(request, names.CANCELLED)
        with contextlib.suppress(Exception):  # nobody is there
            request.sink.abandoned()

    def _leave(self, request: _Request, how: str) -> None:
        """Free what a request held, and count its end."""
        with self._changed:
            if request in self._running:
                self._running.remove(request)
                self._reserved -= request.reserved_bytes
            elif request in self._waiting:
                self._waiting.remove(request)
            self._changed.notify_all()
        request.cache = None
        if not request.is_counted:
            request.is_counted = True
            self._metrics.add(how)
        self._show()

    def _show(self) -> None:
        self._metrics.set(names.RUNNING, len(self._running))
        self._metrics.set(names.WAITING, len(self._waiting))
        self._metrics.set(names.CACHE_BYTES, self._reserved)


def chunk_end(start: int, total: int, chunk: int) -> int:
    """Return the end of the prompt chunk that begins at `start`.

    No chunk but a whole prompt is one token long: models whose decode is another computation than
    their prefill tell the two apart by that, and a prompt's last token belongs to prefill.
    """
    end = min(start + chunk, total)
    return total if total - end == 1 else end
