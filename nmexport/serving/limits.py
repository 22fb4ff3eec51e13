"""The limits of a server, as its operator sets them."""

from __future__ import annotations

from dataclasses import dataclass

from nmexport.errors import RequestError
from nmexport.runtimes.chunks import LEAST_CHUNK

SHARED_STEPS = {"slots": 64, "prefill_chunk": 256}
"""Limits where the session shares steps, and more requests cost little more."""
_LEAST = {"queue": 0, "prefill_chunk": LEAST_CHUNK, "slowdown_percent": 0}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server."""

    context_tokens: int
    """Prompt and output of one request together: the model's context length."""
    cache_bytes: int
    """Limit on the caches of all running requests together."""
    slots: int = 8
    """Requests that run at a time."""
    queue: int = 128
    """Requests that may wait for a slot."""
    prefill_chunk: int = 64
    """Tokens of prompts in one step at most."""
    slowdown_percent: int = 80
    """By how much prompts may lengthen a step that running requests wait for."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run.

        Raises:
            RequestError: naming the limit.
        """
        for name, value in vars(self).items():
            least = _LEAST.get(name, 1)
            if value < least:
                raise RequestError(f"The limit {name} is {value}.", allowed=f"at least {least}")
