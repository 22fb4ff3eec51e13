"""Continuous batching: requests share one session, step by step, and come and go at any step.

A step takes every running request one token further and new ones a chunk of their prompts further,
all in one run where the session can (`Session.shares_steps`). How long the chunks are follows from
what steps take: a long prompt lengthens the others' steps by a bounded share, not by its length.

Whatever a step holds, each request gets the bits that it would have alone: `Session.step` promises
it. Nothing is padded into a batch, since the runtime's attention would sum over padding too; a mask
near a tie flips then, and logits move as far as `test_padding_moves_logits` says. Chunks of a
prompt give the same bits as the whole prompt, or the session says where to cut (`Session.chunk`):
no step has a say in it then. A beginning that another request has computed has the same bits, too.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from nmexport.errors import RequestError, ServerBusyError
from nmexport.generation.sampler import Sampler
from nmexport.generation.stopping import StopFilter
from nmexport.generation.text_stream import TextStream
from nmexport.generation.token_scores import score_token
from nmexport.serving import metrics as names
from nmexport.serving.metrics import Harmless, Metrics, NoMetrics
from nmexport.serving.pace import Pace
from nmexport.serving.prefixes import Prefixes
from nmexport.serving.request import FinishReason, Outcome, Request
from nmexport.serving.sharing import PromptSharing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from nmexport.generation.options import GenerationOptions
    from nmexport.runtimes.session import Session, Stepped
    from nmexport.serving.limits import Limits
    from nmexport.serving.request import Sink
    from nmexport.serving.sharing import Part

DEFAULT_MAX_TOKENS = 256
SHUTTING_DOWN = "the server is shutting down"
_SEE_LOG = "the server's log says why"
_PREFIX_SHARE = 0.25
"""Of the memory for caches: what beginnings of earlier requests may keep."""
_SWEEP_SECONDS = 0.25
"""How often waiting requests are asked whether their client is still there."""


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

        Raises:
            RequestError: if the session holds fewer sequences than there are slots.
        """
        rows = session.limits.batch if session.shares_steps else None
        if rows is not None and limits.slots > rows:
            raise RequestError(
                f"The limit slots is {limits.slots}.", allowed=f"{rows}, the session's own"
            )
        self._session = session
        self._decode = decode
        self._ends = end_tokens
        self.limits = limits
        self._default_max_tokens = default_max_tokens
        self._metrics: Metrics = Harmless(metrics or NoMetrics())
        self._pace = Pace(
            most=limits.prefill_chunk,
            slowdown_percent=limits.slowdown_percent,
            is_fixed=rows is not None,
        )
        self._sharing = PromptSharing(session.chunk)
        self._prefixes = Prefixes(session, int(limits.cache_bytes * _PREFIX_SHARE))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._reserved = 0
        self._closing = False
        self._aborting = False
        self._swept = 0.0
        self._changed = threading.Condition()

    # -- from any thread -------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Number of requests in a slot."""
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
        likeliest: int | None = None,
        wait: bool = False,
    ) -> None:
        """Queue a request.

        Args:
            prompt: Token ids.
            options: How its text is drawn.
            sink: Where its text goes.
            likeliest: How many of the likeliest tokens to name beside each that is drawn, with
                log probabilities; None scores none.
            wait: Wait until the queue has room; a client that goes away meanwhile is dropped.

        Raises:
            RequestError: if it is over a limit.
            ServerBusyError: if the queue is full, or the server is shutting down.
        """
        request = self._admissible(prompt, options, sink, likeliest)
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
        """Tell whether a request fits; those that wait count, as free slots are theirs."""
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
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        sink: Sink,
        likeliest: int | None,
    ) -> Request:
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
        reserved = self._session.cache_bytes(len(prompt) + max_tokens)
        if reserved > self.limits.cache_bytes:
            raise RequestError(
                f"Too long: the request's cache would take {reserved / 1e6:.0f} MB.",
                allowed=f"{self.limits.cache_bytes / 1e6:.0f} MB, all that the server has",
                fix="ask for fewer tokens, or raise the server's limit `cache_bytes`",
            )
        return Request(
            prompt=np.asarray([prompt], dtype=np.int64),
            max_tokens=max_tokens,
            sampler=Sampler(options, prompt=prompt),
            text=TextStream(self._decode),
            stop=StopFilter(options.stop),
            sink=sink,
            reserved_bytes=reserved,
            arrived=time.monotonic(),
            likeliest=likeliest,
        )

    def close(self) -> None:
        """Refuse new requests; `serve` returns once those in flight have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def abort(self) -> None:
        """Refuse new requests, and end those in flight with an error after this step."""
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
        """Sleep until there is work; False once there will be no more."""
        with self._changed:
            while not (self._running or self._waiting or self._closing):
                self._changed.wait()
            return bool(self._running or self._waiting)

    def step(self) -> None:
        """Drop cancelled requests, admit those that fit, and advance all that run."""
        self._drop_cancelled()
        self._admit()
        work = self._share_out()
        if not work:
            return
        decoding = sum(request.is_decoding for request, _ in work)
        prompts = sum(len(tokens) for request, tokens in work if not request.is_decoding)
        began = time.monotonic()
        self._run(work)
        self._pace.observe(time.monotonic() - began, decoding=decoding, prompt_tokens=prompts)

    def _share_out(self) -> list[Part]:
        """Decide for each request's next step: a token, or a share of the prompts' room."""
        decoding = [request for request in self._running if request.is_decoding]
        beginning = [request for request in self._running if not request.is_decoding]
        parts = [(request, request.next_tokens(1)) for request in decoding]
        room = self._pace.budget(decoding=len(decoding))
        return parts + self._sharing.parts(beginning, room, holds_up=bool(decoding))

    def _begin(self, request: Request) -> None:
        """Start an admitted request, from what is cached of its prompt."""
        request.prefilled, request.cache = self._prefixes.find(request.prompt[0])
        if request.prefilled:
            self._metrics.add(names.REUSED_TOKENS, request.prefilled)
        self._prefixes.shrink(self.limits.cache_bytes - self._reserved)

    def _run(self, parts: list[Part]) -> None:
        """Run a step. One that fails is run again request by request: it ends the faulty alone."""
        try:
            results = self._session.step([request.work(tokens) for request, tokens in parts])
        except Exception:
            if len(parts) == 1:
                logging.getLogger(__name__).exception("a request failed")
                self._fail(parts[0][0], f"the model failed on this request; {_SEE_LOG}")
            else:
                for part in parts:
                    self._run([part])
            return
        for (request, tokens), result in zip(parts, results, strict=True):
            request.cache = result.cache
            try:
                self._take(request, tokens, result)
            except Exception:
                logging.getLogger(__name__).exception("a request failed")
                self._fail(request, f"the model failed on this request; {_SEE_LOG}")

    def _take(self, request: Request, tokens: NDArray[np.int64], result: Stepped) -> None:
        """Handle a request's result of a step."""
        if request.is_decoding:
            request.answer.append(request.last_token)
            self._accept(request, result)
            return
        request.prefilled += len(tokens)
        self._metrics.add(names.PROMPT_TOKENS, len(tokens))
        if request.prefilled == request.prompt_tokens:
            self._prefixes.keep(request.prompt[0], request.cache)
            self._accept(request, result)

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

    def _drop_if_cancelled(self, request: Request) -> None:
        try:
            is_cancelled = request.sink.is_cancelled()
        except Exception:
            logging.getLogger(__name__).exception("a client cannot be asked whether it waits")
            self._fail(request, f"the way to the client failed; {_SEE_LOG}")
        else:
            if is_cancelled:
                self._abandon(request)

    def _admit(self) -> None:
        """Admit requests in order of arrival; none overtakes one that does not fit yet."""
        now = time.monotonic()
        with self._changed:
            while self._waiting and len(self._running) < self.limits.slots:
                request = self._waiting[0]
                if self._reserved + request.reserved_bytes > self.limits.cache_bytes:
                    break
                self._waiting.popleft()
                self._running.append(request)
                self._reserved += request.reserved_bytes
                self._begin(request)
                self._metrics.observe(names.QUEUE_TIME, (now - request.arrived) * 1e3)
        self._show()

    def _accept(self, request: Request, result: Stepped) -> None:
        """Draw a request's next token, and return the text it completes."""
        logits = result.logits
        token = result.token if logits is None else request.sampler(logits)
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
        if request.likeliest is not None and logits is not None:
            request.scores.append(
                score_token(logits, token, likeliest=request.likeliest, offset=request.decoded)
            )
        text = request.text.push(token)
        request.decoded += len(text)
        piece = request.stop.push(text)
        if piece:
            request.give(piece)
        if request.stop.stopped:
            self._finish(request, "stop")
        elif request.produced == request.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        rest = request.stop.push(request.text.flush()) + request.stop.flush()
        request.give(rest, is_end=True)
        self._prefixes.keep(request.known, request.cache)
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

    def _fail(self, request: Request, problem: str) -> None:
        self._leave(request, names.FAILED)
        with contextlib.suppress(Exception):  # whoever waits may be what failed
            request.sink.failed(problem)

    def _abandon(self, request: Request) -> None:
        self._leave(request, names.CANCELLED)
        with contextlib.suppress(Exception):  # nobody is there
            request.sink.abandoned()

    def _leave(self, request: Request, how: str) -> None:
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
        self._metrics.set(names.PREFIX_BYTES, self._prefixes.bytes)
