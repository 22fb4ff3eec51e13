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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SIGN = np.uint32(1 << 31)


class Sampler:
    """Chooses one sequence's next token from logits `[V]`."""

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        prompt: Sequence[int] = (),
    ) -> None:
        """Start with the prompt's tokens seen, and none drawn.

        Args:
            temperature: 0 takes the likeliest token (the first of equals).
            top_p: Draw from the likeliest tokens that together hold this probability.
            top_k: Draw from this many likeliest tokens; 0 is no limit.
            seed: Of the draws.
            repetition_penalty: Divides positive and multiplies negative logits of tokens seen, in
                prompt or output (CTRL, arXiv 1909.05858); 1 changes nothing.
            presence_penalty: Taken once from the logit of a token drawn before, as in OpenAI's API.
            frequency_penalty: Taken for each time it was drawn.
            prompt: Token ids.
        """
        self._temperature = temperature
        self._top_p = top_p
        self._top_k = top_k
        self._repetition = repetition_penalty
        self._presence = presence_penalty
        self._frequency = frequency_penalty
        self._seen = set(prompt)
        self._drawn: dict[int, int] = {}
        self._rng = np.random.default_rng(seed)

    @property
    def is_greedy(self) -> bool:
        """It takes the first of the largest logits, whatever came before."""
        is_plain = self._repetition == 1.0 and not self._presence and not self._frequency
        return self._temperature == 0 and is_plain

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """One token id; it counts as drawn."""
        token = self._choose(self._penalise(logits))
        self._seen.add(token)
        self._drawn[token] = self._drawn.get(token, 0) + 1
        return token

    def _choose(self, logits: NDArray[np.float32]) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = self._candidates(logits)
        return int(self._rng.choice(tokens, p=probabilities))

    def _penalise(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits less the penalties; the argument itself where there are none."""
        if self._repetition != 1.0 and self._seen:
            logits = logits.copy()
            seen = np.fromiter(self._seen, np.int64)
            values = logits[seen]
            logits[seen] = np.where(
                values > 0, values / self._repetition, values * self._repetition
            )
        if (self._presence or self._frequency) and self._drawn:
            logits = logits.copy()
            drawn = np.fromiter(self._drawn.keys(), np.int64)
            counts = np.fromiter(self._drawn.values(), np.float32)
            logits[drawn] -= self._presence + self._frequency * counts
        return logits

    def _candidates(
        self, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Token ids that may be drawn, likeliest first, and their probabilities."""
        order = likeliest_tokens(logits, self._top_k)
        scaled = logits[order].astype(np.float64) / self._temperature
        probabilities = np.exp(scaled - scaled[0])
        probabilities /= probabilities.sum()
        # A token stays as long as those before it do not hold top_p yet: the first always does.
        before = np.cumsum(probabilities) - probabilities
        kept = probabilities[before < self._top_p]
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
