"""Decides how much of each prompt the next step takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nmexport.serving.request import Request

_FAIR_CHUNK = 16
"""Tokens of a prompt below which it is not shared out: the oldest comes first."""
_NONE = np.zeros(0, np.int64)

Part = tuple["Request", "NDArray[np.int64]"]
"""A request, and its tokens `[S]` in a step."""


class PromptSharing:
    """Divides a step's prompt tokens among prompts."""

    def __init__(self, chunk: int | None) -> None:
        """Start without debts.

        Args:
            chunk: Where prompts must be cut, as `Session.chunk`; None is anywhere.
        """
        self._chunk = chunk
        self._owed = 0
        """Tokens by which earlier steps went over their room."""

    def parts(self, prompts: Sequence[Request], room: int, *, holds_up: bool) -> list[Part]:
        """Divide `room` tokens among prompts, the oldest first.

        Args:
            prompts: Requests whose prompts are not through.
            room: Tokens.
            holds_up: Somebody waits for the step's other part; else chunks that cannot be shorter
                take what they need.
        """
        if self._chunk is None:
            return _fair_parts(prompts, room)
        if not holds_up:
            self._owed = 0
            return [(request, request.next_tokens(self._chunk)) for request in prompts]
        # A step has no say in where a prompt is cut, so the last chunk may be longer than the room
        # that is left: the steps after it make up for that.
        parts = []
        left = room - self._owed
        for request in prompts:
            if left <= 0:
                break
            tokens = request.next_tokens(self._chunk)
            parts.append((request, tokens))
            left -= len(tokens)
        self._owed = max(-left, 0)
        return parts


def _fair_parts(prompts: Sequence[Request], room: int) -> list[Part]:
    parts = []
    fair = max(room // max(len(prompts), 1), _FAIR_CHUNK)
    for request in prompts:
        tokens = request.next_tokens(min(fair, room)) if room > 0 else _NONE
        if len(tokens):
            parts.append((request, tokens))
            room -= len(tokens)
    return parts
