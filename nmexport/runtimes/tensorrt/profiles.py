"""Optimisation profiles: for which sizes an engine is built, and for which it is fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nmexport.recipe import Recipe

PREFILL, DECODE = PROFILES = ("prefill", "decode")
"""In the plan's order."""
_PARITY_PROMPT = 32  # tokens of the prompts that verification continues
_SPARE_STEPS = 64  # decode steps after the timed context, for warm-up and generation
_ROUNDING = 64  # capacities are multiples of this, so that near recipes share an engine


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest sizes that an engine takes, and those it should be fastest at."""

    max_batch: int
    max_sequence: int
    """New tokens of one run."""
    max_context: int
    """Tokens in the cache and new tokens together."""
    best_sequence: int
    best_context: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Shapes of every input: least, best and largest."""

    name: str
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes of the graph's axes at one corner of a profile."""

    batch: int
    sequence: int
    past: int

    def of(self, axis: int | str | None) -> int:
        if isinstance(axis, int):
            return axis
        named = {
            "batch_size": self.batch,
            "sequence_length": self.sequence,
            "past_sequence_length": self.past,
            "total_sequence_length": self.past + self.sequence,
        }
        return named[str(axis)]


def limits_from(recipe: Recipe) -> Limits:
    """Return the recipe's limits; those left open suffice for its own verification.

    Raises:
        RecipeError: if a context is asked for that the recipe's own measurements do not fit in.
    """
    engine, evaluation, latency = recipe.engine, recipe.evaluation, recipe.latency
    sequence = max(evaluation.length, latency.prefill_tokens, latency.decode_context)
    context = max(
        sequence,
        latency.decode_context + _SPARE_STEPS,
        _PARITY_PROMPT + evaluation.generate_tokens,
    )
    needed = -(-context // _ROUNDING) * _ROUNDING
    max_context = engine.max_context or needed
    max_sequence = engine.max_sequence or min(sequence, max_context)
    if max_sequence > max_context:
        raise RecipeError(
            f"engine.max_sequence {max_sequence} exceeds engine.max_context {max_context}.",
            allowed=f"at most {max_context}",
        )
    return Limits(
        max_batch=engine.max_batch,
        max_sequence=max_sequence,
        max_context=max_context,
        best_sequence=min(latency.prefill_tokens, max_sequence),
        best_context=min(latency.decode_context, max_context - 1),
    )


def profiles_for(
    inputs: Mapping[str, Sequence[int | str | None]], limits: Limits
) -> tuple[Profile, Profile]:
    """Make a profile for whole prompts, and one for one token a sequence.

    Args:
        inputs: Axes of each graph input by name: a size, or the product's name of the axis.
        limits: Sizes to build for.
    """
    cached = limits.max_context - 1
    prefill = (
        _Sizes(batch=1, sequence=1, past=0),
        _Sizes(batch=1, sequence=limits.best_sequence, past=0),
        _Sizes(batch=limits.max_batch, sequence=limits.max_sequence, past=cached),
    )
    decode = (
        _Sizes(batch=1, sequence=1, past=0),
        _Sizes(batch=1, sequence=1, past=limits.best_context),
        _Sizes(batch=limits.max_batch, sequence=1, past=cached),
    )
    first, second = (
        Profile(
            name=name,
            shapes={given: _corners(axes, corners) for given, axes in inputs.items()},
        )
        for name, corners in ((PREFILL, prefill), (DECODE, decode))
    )
    return first, second


def _corners(
    axes: Sequence[int | str | None], corners: tuple[_Sizes, _Sizes, _Sizes]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, best, largest = (tuple(corner.of(axis) for axis in axes) for corner in corners)
    return least, best, largest
