"""Clients of a running server: each streams an answer, then asks again; some cancel mid-stream."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nmexport.serving import client

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request."""

    fields: Mapping[str, Any]
    """The model's inputs."""
    leave_after: int | None = None
    """Pieces of text after which the client goes away; None stays to the end."""


@dataclass(kw_only=True)
class Answered:
    """Result of one request, as its client saw it."""

    first_ms: float = 0.0
    """Until the first piece of text."""
    next_ms: list[float] = field(default_factory=list)
    """Between two pieces of text."""
    tokens: int = 0
    """As the server counts them; 0 where the client went away."""
    left: bool = False


def drive(url: str, model: str, asks: Iterable[Ask], *, clients: int) -> list[Answered]:
    """Send all requests, `clients` at a time.

    Args:
        url: The server's.
        model: Its name.
        asks: Requests, taken as clients become free.
        clients: Connections at a time.

    Raises:
        EnvironmentFault: if the server goes away.
        RequestError: if it refuses a request.
    """
    queue = _Queue(iter(asks))

    def work() -> list[Answered]:
        answers = []
        while (ask := queue.next()) is not None:
            try:
                answers.append(_answer(url, model, ask))
            except BaseException:
                queue.end()  # nobody goes on where one failed
                raise
        return answers

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(work) for _ in range(clients)]
        return [answered for future in running for answered in future.result()]


class _Queue:
    """Requests that threads share."""

    def __init__(self, asks: Iterator[Ask]) -> None:
        self._asks = asks
        self._lock = threading.Lock()
        self._is_over = False

    def next(self) -> Ask | None:
        with self._lock:
            return None if self._is_over else next(self._asks, None)

    def end(self) -> None:
        self._is_over = True


def _answer(url: str, model: str, ask: Ask) -> Answered:
    answered = Answered()
    pieces = 0
    last = time.perf_counter()
    responses = client.stream(url, model, ask.fields)
    for response in responses:
        now = time.perf_counter()
        if response["text_output"]:
            pieces += 1
            if pieces == 1:
                answered.first_ms = (now - last) * 1e3
            else:
                answered.next_ms.append((now - last) * 1e3)
            last = now
        if pieces == ask.leave_after:
            responses.close()
            answered.left = True
            return answered
        answered.tokens = response.get("completion_tokens") or 0
    return answered
