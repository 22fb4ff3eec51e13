"""Log probabilities of a text's tokens: what OpenAI's API calls `logprobs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nmexport.generation.sampler import likeliest_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_LIKELIEST = 20
"""As OpenAI's API allows."""


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """One token of an answer, and how likely the model held it."""

    token: int
    log_probability: float
    """Natural logarithm, from the model's own logits: before temperature and penalties."""
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest tokens in its place and their log probabilities, likeliest first."""
    offset: int
    """Characters of the answer before it."""


def score_token(
    logits: NDArray[np.float32], token: int, *, likeliest: int, offset: int
) -> TokenScore:
    """Score a token that was drawn.

    Args:
        logits: `[V]`, as the model gave them.
        token: What was drawn from them.
        likeliest: How many of the likeliest tokens to name, 0 to V; equals by lower id.
        offset: Characters of the answer before it.
    """
    exact = logits.astype(np.float64)
    highest = exact.max()
    total = highest + np.log(np.exp(exact - highest).sum())
    order = likeliest_tokens(logits, likeliest).tolist() if likeliest else []
    return TokenScore(
        token=token,
        log_probability=float(exact[token] - total),
        likeliest=tuple((token, float(exact[token] - total)) for token in order),
        offset=offset,
    )
