"""Options of a generation request, and errors for those that are not allowed."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Wider than anybody draws, and far from where float32 or the exponential overflows. Each bound is
# met by the float32 that is nearest to it: clients send those.
_TEMPERATURES = (0.001, 100.0)
_REPETITION = (0.1, 10.0)
_LARGEST_PENALTY = 100.0
_MOST_STOPS = 16
_LONGEST_STOP = 256
_SEEDS = 2**64


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How one request's text is drawn and where it ends."""

    max_tokens: int | None = None
    """At most this many tokens; None is the server's default, cut to the context that is left."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """Random seed; None draws a new one for each request."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; not part of it."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            RequestError: naming every such value and what is allowed.
        """
        longest = max(map(len, self.stop), default=0)
        penalties = f"-{_LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g}"
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            (
                "temperature",
                self.temperature == 0 or _is_within(self.temperature, *_TEMPERATURES),
                "0, or {:g} to {:g}".format(*_TEMPERATURES),
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            (
                "repetition_penalty",
                _is_within(self.repetition_penalty, *_REPETITION),
                "{:g} to {:g}".format(*_REPETITION),
            ),
            ("presence_penalty", abs(self.presence_penalty) <= _LARGEST_PENALTY, penalties),
            ("frequency_penalty", abs(self.frequency_penalty) <= _LARGEST_PENALTY, penalties),
            ("seed", self.seed is None or 0 <= self.seed < _SEEDS, "0 to 2^64 - 1"),
            (
                "stop",
                len(self.stop) <= _MOST_STOPS and longest <= _LONGEST_STOP,
                f"up to {_MOST_STOPS} texts of up to {_LONGEST_STOP} characters",
            ),
        )
        wrong = [
            f"{name} {getattr(self, name)!r} (allowed: {allowed})"
            for name, holds, allowed in rules
            if not holds
        ]
        if wrong:
            raise RequestError(f"Out of range: {', '.join(wrong)}.")

    @property
    def seed_or_new(self) -> int:
        """The seed, or a random one."""
        return secrets.randbits(63) if self.seed is None else self.seed


def _is_within(value: float, least: float, most: float) -> bool:
    return least <= value <= most


GREEDY = GenerationOptions()


_KINDS: Mapping[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "top_k": (int,),
    "repetition_penalty": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "seed": (int,),
    "stop": (tuple,),
}
_IN_WORDS = {int: "a whole number", float: "a number", tuple: "texts"}
# Other servers' names for the same thing.
_ALIASES = {"random_seed": "seed", "stop_words": "stop"}
NAMES = (*_KINDS, *_ALIASES)
"""All names that a request may set, aliases included."""


def options_from(
    values: Mapping[str, Any], defaults: GenerationOptions | None = None
) -> GenerationOptions:
    """Read the options of a request.

    Args:
        values: By name; a stop text may stand alone.
        defaults: For what is not named.

    Raises:
        RequestError: if a name is unknown or given twice, or a value has the wrong type or is out
            of range.
    """
    chosen: dict[str, Any] = {}
    for given, value in values.items():
        name = _ALIASES.get(given, given)
        if name not in _KINDS:
            raise RequestError(
                f"Unknown parameter {given!r}.", allowed=", ".join(sorted(set(_KINDS)))
            )
        if name in chosen:
            raise RequestError(f"{name} is given twice.")
        chosen[name] = _check_value(given, name, value)
    return dataclasses.replace(defaults or GenerationOptions(), **chosen)


def _check_value(given: str, name: str, value: Any) -> int | float | tuple[str, ...]:
    kinds = _KINDS[name]
    if name == "stop":
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            return tuple(texts)
    elif isinstance(value, int | float) and isinstance(value, kinds) and type(value) is not bool:
        return float(value) if float in kinds else value
    raise RequestError(
        f"Parameter {given} cannot be {value!r}.", allowed=f"{given}: {_IN_WORDS[kinds[-1]]}"
    )
