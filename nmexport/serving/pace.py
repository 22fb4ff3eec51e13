"""Sizes the prompts' share of a step, so that running requests are not held up."""

from __future__ import annotations

_LEAST = 4
"""Tokens of prompts that a measured step has room for: new requests get on, however slow it is."""
_WEIGHT = 0.3
"""Of the newest measurement in the running mean."""


class Pace:
    """Learns how long steps take, and sizes the prompts' part of the next one."""

    def __init__(self, *, most: int, slowdown_percent: int, is_fixed: bool = False) -> None:
        """Begin without measurements.

        Args:
            most: Tokens of prompts in one step, whoever waits.
            slowdown_percent: By how much they may lengthen a step that others wait for.
            is_fixed: A step takes as long for one request as for many.
        """
        self._is_fixed = is_fixed
        self._most = most
        self._slowdown = slowdown_percent / 100
        self._steps_s: dict[int, float] = {}
        """Seconds of a step without prompts, by how many requests it carries."""
        self._token_s: float | None = None
        """Seconds that one token of a prompt adds."""

    def budget(self, *, decoding: int) -> int:
        """Return the prompt tokens that the next step may carry, next to the decoding requests."""
        if not decoding:
            return self._most
        decoding = 1 if self._is_fixed else decoding
        if decoding not in self._steps_s:
            return 0  # one step without prompts shows what so many requests take
        least = min(_LEAST, self._most)
        if not self._token_s:
            return least
        room = int(self._slowdown * self._steps_s[decoding] / self._token_s)
        return max(least, min(self._most, room))

    def observe(self, seconds: float, *, decoding: int, prompt_tokens: int) -> None:
        """Learn from a finished step."""
        decoding = min(decoding, 1) if self._is_fixed else decoding
        if not prompt_tokens:
            self._steps_s[decoding] = _mean(self._steps_s.get(decoding), seconds)
        elif not decoding:
            self._token_s = _mean(self._token_s, seconds / prompt_tokens)
        elif decoding in self._steps_s:
            more = max(seconds - self._steps_s[decoding], 0.0)
            self._token_s = _mean(self._token_s, more / prompt_tokens)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + _WEIGHT * (new - before)
