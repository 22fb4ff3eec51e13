"""Carries one request's text from the scheduler's thread to the event loop that sends it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.serving.request import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from nmexport.generation.token_scores import TokenScore
    from nmexport.serving.request import Usage


@dataclass(frozen=True)
class Failure:
    """A request that ended without an outcome."""

    problem: str


@dataclass(frozen=True)
class Piece:
    """A piece of text, with the scores of its tokens where they were asked for."""

    text: str
    scores: tuple[TokenScore, ...] = ()


Event = Piece | Outcome | Failure
"""A piece of text, or the end: an outcome or a failure."""
GONE = "the client went away"


class EventSink:
    """One request's events; made in the loop, filled from the scheduler's thread."""

    def __init__(self) -> None:
        """Wait for events in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._is_left = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield events as they come; the last is no text."""
        while True:
            event = await self._events.get()
            yield event
            if not isinstance(event, Piece):
                return

    def leave(self) -> None:
        """Tell the scheduler that the client has gone."""
        self._is_left = True

    def text(
        self,
        piece: str,
        usage: Usage,  # noqa: ARG002  the outcome has it all
        scores: Sequence[TokenScore],
    ) -> None:
        """Pass a piece to the loop."""
        self._put(Piece(piece, tuple(scores)))

    def done(self, outcome: Outcome) -> None:
        """Pass the end to the loop."""
        self._put(outcome)

    def failed(self, problem: str) -> None:
        """Pass the failure to the loop."""
        self._put(Failure(problem))

    def is_cancelled(self) -> bool:
        """Tell whether the client went away."""
        return self._is_left

    def abandoned(self) -> None:
        """End a loop that still waits for events."""
        self._put(Failure(GONE))

    def _put(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)
