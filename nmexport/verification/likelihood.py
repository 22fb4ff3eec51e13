"""Log-likelihoods of given continuations: what task scores are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nmexport.verification.perplexity import log_softmax, token_nll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

# A batch's logits are what takes memory: 1.3 million of them a thousand tokens of SmolLM2.
_LOGITS_BYTES = 256 << 20
_MAX_BATCH = 32
_FILLER = 0  # any token does: it stands behind what is scored


class Score(NamedTuple):
    """A model's score of one continuation."""

    logprob: float
    """Natural logarithm of its probability, summed over its tokens."""
    is_greedy: bool
    """True where greedy decoding would have produced it."""


@dataclass(frozen=True)
class ScoredText:
    """A continuation and its context; together no longer than the model's window."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @classmethod
    def fitted(
        cls, context: Sequence[int], continuation: Sequence[int], max_length: int
    ) -> ScoredText:
        """Cut the context from the left so that all but the last token fit into the window.

        Raises:
            ValueError: if the continuation is empty, alone too long, or has nothing before it.
        """
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"{len(continuation)} tokens after {len(context)} cannot be scored in a window of "
                f"{max_length}"
            )
        room = max_length + 1 - len(continuation)
        return cls(tuple(context[-room:]), tuple(continuation))

    @property
    def read(self) -> tuple[int, ...]:
        """Tokens that the model reads: all but the last, which it only predicts."""
        return (*self.context, *self.continuation)[:-1]


def scores(
    session: Session,
    texts: Sequence[ScoredText],
    *,
    stepwise: bool,
    advance: Callable[[], object] = lambda: None,
) -> list[Score]:
    """Score continuations.

    Args:
        session: The model.
        texts: What to score, in any order.
        stepwise: Read a continuation token by token through the cache, as generation does: what a
            model whose phases differ must be scored by. Else each text is one prompt.
        advance: Called once for each text that is done.

    Returns:
        One score for each text, in their order.
    """
    run = _stepwise_scores if stepwise else _prompt_scores
    by_text: dict[ScoredText, Score] = {}
    waiting: dict[ScoredText, int] = {}
    for text in texts:
        waiting[text] = waiting.get(text, 0) + 1
    for text, score in run(session, list(waiting)):
        by_text[text] = score
        for _ in range(waiting[text]):
            advance()
    return [by_text[text] for text in texts]


def _prompt_scores(
    session: Session, texts: Sequence[ScoredText]
) -> Iterator[tuple[ScoredText, Score]]:
    """Score whole texts as prompts; equal tokens share one run (answers A to D)."""
    sharing: dict[tuple[int, ...], list[ScoredText]] = {}
    for text in texts:
        sharing.setdefault(text.read, []).append(text)
    for batch in _batches(sorted(sharing, key=lambda read: (-len(read), read)), session):
        logits = session.prefill(_pad(batch))
        for read, rows in zip(batch, logits, strict=True):
            for text in sharing[read]:
                start = len(read) - len(text.continuation)
                yield text, _score(rows[start : len(read)], text.continuation)


def _stepwise_scores(
    session: Session, texts: Sequence[ScoredText]
) -> Iterator[tuple[ScoredText, Score]]:
    """Score with contexts as prompts of one length, then one token at a time.

    What the prompt predicts is the first token: generation chooses it the same way.
    """
    order = sorted(texts, key=lambda text: (-len(text.context), -len(text.continuation)))
    by_length: dict[int, list[ScoredText]] = {}
    for text in order:
        by_length.setdefault(len(text.context), []).append(text)
    for group in by_length.values():
        for start in range(0, len(group), _batch_size(session, len(group[0].context))):
            batch = group[start : start + _batch_size(session, len(group[0].context))]
            logits = _teacher_forced(session, batch)
            for text, rows in zip(batch, logits, strict=True):
                yield text, _score(rows[: len(text.continuation)], text.continuation)


def _teacher_forced(session: Session, batch: Sequence[ScoredText]) -> NDArray[np.float32]:
    """Compute the logits `[B, longest continuation, V]` of the continuations' tokens."""
    prompt = np.array([text.context for text in batch], dtype=np.int64)
    steps = _pad([text.continuation for text in batch])
    first = session.prefill(prompt)[:, -1:]
    columns = (steps[:, at : at + 1] for at in range(steps.shape[1] - 1))
    return np.concatenate([first, *(session.decode_step(column) for column in columns)], axis=1)


def _score(logits: NDArray[np.float32], continuation: Sequence[int]) -> Score:
    """Score from the logits `[T, V]` that predict a continuation `[T]`."""
    targets = np.array(continuation, dtype=np.int64)
    nll = token_nll(log_softmax(logits), targets)
    return Score(-float(nll.sum()), bool((logits.argmax(axis=-1) == targets).all()))


def _pad(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Pad rows of tokens on the right: a causal model's results do not depend on that."""
    padded = np.full((len(rows), max(map(len, rows))), _FILLER, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _batches(
    reads: Sequence[tuple[int, ...]], session: Session
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Batch neighbours in a list sorted by falling length, for little padding."""
    start = 0
    while start < len(reads):
        end = start + _batch_size(session, len(reads[start]))
        yield reads[start:end]
        start = end


def _batch_size(session: Session, tokens: int) -> int:
    """Return how many sequences of that length fit by their logits and the session's limits."""
    each = 4 * session.vocabulary_size * tokens
    return max(1, min(session.limits.batch or _MAX_BATCH, _MAX_BATCH, _LOGITS_BYTES // each))
