"""How much of parity is run: all of it where that takes minutes, a part of a larger model.

Parity runs slow executors: torch step by step, function bodies, an oracle in float64. What they
take grows with weights times tokens, so that is what is bounded. The choice depends on the model's
size, the recipe and the kind of device alone, never on a clock: two runs compare the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nmexport.runtimes.engine import Provider
    from nmexport.store.layers import LayerSpec

TOKEN_WORK: Mapping[Provider, float] = {"cpu": 4e12, "cuda": 1e14}
"""Weights times tokens of whole models. Two cores of a Xeon do some 2e10 a second, so a model of
1.3 billion parameters is compared as a whole there, in three minutes; a GPU does 100 times that."""
LINEAR_WORK: Mapping[Provider, float] = {"cpu": 2e9, "cuda": 1e11}
"""Weights of linears that are held against the oracle: a host takes some 30 s for each billion."""
_PASSES = 4  # torch with its twin, function bodies, engine
_LEAST_STEPS = 8
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The extent of parity: how much it runs, and where."""

    device: Provider
    """Where torch and the function bodies run."""
    prompts: int
    of_prompts: int
    prompt_tokens: int
    steps: int
    of_steps: int
    linears: tuple[LayerSpec, ...]
    """Held against the oracle, in model order."""
    of_linears: int

    @property
    def is_whole(self) -> bool:
        """Tell whether nothing is left out."""
        return (self.prompts, self.steps, len(self.linears)) == (
            self.of_prompts,
            self.of_steps,
            self.of_linears,
        )

    def words(self) -> str:
        """Describe it for a report."""
        place = "on the GPU" if self.device == "cuda" else "on the CPU"
        if self.is_whole:
            return (
                f"Torch and the function bodies ran {place}, on all of {self.prompts} prompts of "
                f"{self.prompt_tokens} tokens and {self.steps} steps; the oracle on all "
                f"{self.of_linears} linears."
            )
        return (
            f"Torch and the function bodies ran {place}. To bound the time at this model's size, "
            f"parity took {self.prompts} of {self.of_prompts} prompts, {self.steps} of "
            f"{self.of_steps} steps, and {len(self.linears)} of {self.of_linears} linears, spread "
            "evenly over the model."
        )


def extent_of(
    layers: Sequence[LayerSpec],
    *,
    device: Provider,
    prompts: int,
    prompt_tokens: int,
    steps: int,
) -> Extent:
    """Choose how much of parity to run.

    Args:
        layers: The model's linears that are nodes of ours, in model order.
        device: Where torch and the function bodies run.
        prompts: Prompts that there are.
        prompt_tokens: Tokens of each.
        steps: Decode steps that the recipe asks for.
    """
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    kept_prompts, kept_steps = prompts, steps

    def work() -> float:
        return _PASSES * weights * kept_prompts * (prompt_tokens + kept_steps)

    while work() > TOKEN_WORK[device] and (kept_prompts > 1 or kept_steps > _LEAST_STEPS):
        if kept_prompts > 1:
            kept_prompts = -(-kept_prompts // 2)
        else:
            kept_steps = max(min(_LEAST_STEPS, steps), kept_steps // 2)
    return Extent(
        device=device,
        prompts=kept_prompts,
        of_prompts=prompts,
        prompt_tokens=prompt_tokens,
        steps=kept_steps,
        of_steps=steps,
        linears=_spread(layers, LINEAR_WORK[device]),
        of_linears=len(layers),
    )


def _spread(layers: Sequence[LayerSpec], most: float) -> tuple[LayerSpec, ...]:
    """As many as have so many weights together, at least one, spread evenly over the model.

    In the order of multiples of the golden ratio, no period of the layers is met: kinds of linears
    come as often as they are.
    """
    order = sorted(range(len(layers)), key=lambda place: place * _GOLDEN % 1.0)
    chosen: set[int] = set()
    total = 0
    for place in order:
        total += layers[place].in_features * layers[place].out_features
        if chosen and total > most:
            break
        chosen.add(place)
    return tuple(layer for place, layer in enumerate(layers) if place in chosen)
