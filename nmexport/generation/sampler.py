"""The choice of the next token, in NumPy.

Neither transformers' logits processors nor onnxruntime-genai's search is used. The first compute
on torch tensors, which would put torch into the server's loop and image. The second owns model,
cache and loop in one object, whose batches change a request's tokens
(`tests/serving/test_genai_engine.py`). One request has one generator here, so its text is the same
whatever else runs in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nmexport.generation.options import GREEDY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nmexport.generation.options import GenerationOptions

_SIGN = np.uint32(1 << 31)


class Sampler:
    """Chooses one sequence's next token from logits `[V]`."""

    def __init__(self, options: GenerationOptions = GREEDY, *, prompt: Sequence[int] = ()) -> None:
        """Start with the prompt's tokens seen, and none drawn.

        Args:
            options: How to draw. Greedy takes the first of equals. The repetition penalty divides
                positive and multiplies negative logits of tokens seen, in prompt or output (CTRL,
                arXiv 1909.05858). The presence penalty is taken once from the logit of a token
                drawn before, the frequency penalty each time it was drawn, as in OpenAI's API.
            prompt: Token ids.
        """
        self._options = options
        self._seen = set(prompt)
        self._drawn: dict[int, int] = {}
        self._rng = np.random.default_rng(options.seed_or_new)

    @property
    def is_greedy(self) -> bool:
        """True where the first of the largest logits is taken, whatever came before."""
        options = self._options
        has_penalty = options.presence_penalty or options.frequency_penalty
        return options.temperature == 0 and options.repetition_penalty == 1.0 and not has_penalty

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Choose one token id; it counts as drawn."""
        token = self._choose(self._penalise(logits))
        self._seen.add(token)
        self._drawn[token] = self._drawn.get(token, 0) + 1
        return token

    def _choose(self, logits: NDArray[np.float32]) -> int:
        if self._options.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = self._candidates(logits)
        return int(self._rng.choice(tokens, p=probabilities))

    def _penalise(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the penalties off the logits; returns the argument itself where there are none."""
        options = self._options
        if options.repetition_penalty != 1.0 and self._seen:
            logits = logits.copy()
            seen = np.fromiter(self._seen, np.int64)
            values, penalty = logits[seen], options.repetition_penalty
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if (options.presence_penalty or options.frequency_penalty) and self._drawn:
            logits = logits.copy()
            drawn = np.fromiter(self._drawn.keys(), np.int64)
            counts = np.fromiter(self._drawn.values(), np.float32)
            logits[drawn] -= options.presence_penalty + options.frequency_penalty * counts
        return logits

    def _candidates(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the token ids that may be drawn, likeliest first, and their probabilities."""
        order = likeliest_tokens(logits, self._options.top_k)
        scaled = logits[order].astype(np.float64) / self._options.temperature
        probabilities = np.exp(scaled - scaled[0])
        probabilities /= probabilities.sum()
        # A token stays as long as those before it do not hold top_p yet: the first always does.
        before = np.cumsum(probabilities) - probabilities
        kept = probabilities[before < self._options.top_p]
        return order[: kept.size], kept / kept.sum()


def likeliest_tokens(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest logits (0: of all), largest first, equals by lower id."""
    if not 0 < count < logits.size:
        return _descending(logits)
    # Few of a whole vocabulary: find the last that stays, sort from it up.
    least = np.partition(logits, logits.size - count)[logits.size - count]
    ids = np.flatnonzero(logits >= least)
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _descending(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The order of `np.argsort(-logits, kind="stable")`, several times faster.

    The bits of positive floats, read as whole numbers, are in their order, those of negative ones
    in the reverse. NumPy sorts 16-bit numbers by counting: here by the low halves first, and then,
    which keeps the order among equals, by the high ones.
    """
    # + 0 makes zero of minus zero: they are equal.
    bits = (-logits.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)
    keys = np.where(bits >= _SIGN, ~bits, bits | _SIGN)
    by_low = np.argsort(keys.astype(np.uint16), kind="stable")
    by_high = np.argsort((keys >> 16).astype(np.uint16)[by_low], kind="stable")
    return by_low[by_high]
