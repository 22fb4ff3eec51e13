"""Greedy continuations: what a person would read from the dense and from the sparse model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nmexport.progress import busy
from nmexport.report.model import Continuation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session

PROTOCOL = (
    "Prompts are the first tokens of the evaluation windows. Both models continue greedily for a "
    "fixed number of tokens; an end-of-text token does not stop them. Free-running: each reads its "
    "own tokens. Guided: the sparse model reads the dense model's tokens."
)


def greedy(session: Session, prompts: NDArray[np.int64], steps: Iterable[int]) -> NDArray[np.int64]:
    """Continue prompts `[B, P]` by one token for each step; tokens `[B, steps]`.

    Args:
        session: The model.
        prompts: Token ids, all prompts of one length.
        steps: One item for each token wanted (a range, tracked or not).
    """
    tokens: list[NDArray[np.int64]] = []
    for _ in steps:
        logits = session.decode_step(tokens[-1][:, None]) if tokens else session.prefill(prompts)
        tokens.append(logits[:, -1].argmax(axis=-1).astype(np.int64))
    return np.stack(tokens, axis=1)


def follow(
    session: Session, prompts: NDArray[np.int64], continuation: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the greedy tokens `[B, T]` that a model chooses while reading a continuation."""
    whole = np.concatenate([prompts, continuation[:, :-1]], axis=1)
    rows = [session.prefill(row[None, :])[0, prompts.shape[1] - 1 :] for row in whole]
    return np.stack([logits.argmax(axis=-1) for logits in rows]).astype(np.int64)


def first_divergence(left: NDArray[np.int64], right: NDArray[np.int64]) -> list[int | None]:
    """Find the first unequal token in each row of `[B, T]`; None where rows are equal."""
    unequal = left != right
    return [int(row.argmax()) if row.any() else None for row in unequal]


def compare(
    dense: Session,
    sparse: Session,
    prompts: NDArray[np.int64],
    steps: int,
    *,
    progress: Progress,
) -> Continuation:
    """Continue prompts `[B, P]` by some steps with both models and say how alike the texts are."""

    def track(side: str) -> Iterable[int]:
        return progress.track(range(steps), label=f"verify: continuation, {side}", total=steps)

    dense_tokens = greedy(dense, prompts, track("dense"))
    sparse_tokens = greedy(sparse, prompts, track("sparse"))
    with busy(progress, "verify: continuation, guided"):
        guided_tokens = follow(sparse, prompts, dense_tokens)
    divergences = first_divergence(dense_tokens, sparse_tokens)
    length = dense_tokens.shape[1]
    return Continuation(
        prompts=int(prompts.shape[0]),
        prompt_tokens=int(prompts.shape[1]),
        generated_tokens=length,
        free_running_agreement=float((dense_tokens == sparse_tokens).mean()),
        guided_agreement=float((guided_tokens == dense_tokens).mean()),
        first_divergence=tuple(divergences),
        median_first_divergence=float(
            np.median([length if at is None else at for at in divergences])
        ),
        protocol=PROTOCOL,
    )
