"""Perplexity and divergence of a sparse session against a dense one, in one pass over windows."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from nmexport.environment import physical_cores
from nmexport.report.model import Accuracy, Likelihood, Scores
from nmexport.verification.divergence import DivergenceSum
from nmexport.verification.perplexity import NllSum, log_softmax, ratio_stderr, token_nll

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session
    from nmexport.store.layers import ModelPhases

# Rows of logits that become float64 at once: few stay in the CPU's caches.
_ROWS = 8
# Phases whose models are scored on what they decode.
_STEPWISE = ("decode", "mixed")

_WHOLE = (
    "Fixed windows that do not overlap, run as whole prompts with no context from outside the "
    "window. A window is scored from its second token. "
)
_DECODED = (
    "Fixed windows that do not overlap, with no context from outside the window. The first half "
    "of a window is the prompt, which runs dense; the sparse model reads the rest token by token "
    "through its cache, and what it predicts from there is scored, for both models. "
)
_MIXED = (
    "Fixed windows that do not overlap, with no context from outside the window. The first half "
    "of a window is the prompt, where some linears are dense; the sparse model reads the rest "
    "token by token through its cache, and what it predicts from there is scored, for both models. "
)
_FIGURES = (
    "Negative log-likelihoods are float64 log-softmax of the runtime's logits, averaged over all "
    "scored tokens; perplexity is the exponential of that mean. KL(dense || sparse), in nats, and "
    "top-1 agreement are means over the same tokens. Dense and sparse logits both come from the "
    "shipped ONNX files."
)


_HANDED_OVER = (
    "The same windows. The dense model reads the first half of a window as a prompt; the sparse "
    "model takes over its cache and reads the rest token by token, and what it predicts from there "
    "is scored. `second_half` has the figures of sparsity in all phases on the same tokens."
)


class WindowComparison:
    """Accumulators for one dense and one sparse model; those of disjoint windows merge."""

    def __init__(self) -> None:
        self.dense = NllSum()
        self.sparse = NllSum()
        self.divergence = DivergenceSum()
        self.late_dense = NllSum()
        self.late_sparse = NllSum()

    def merge(self, other: WindowComparison) -> None:
        """Append another's windows."""
        for name in ("dense", "sparse", "late_dense", "late_sparse", "divergence"):
            getattr(self, name).merge(getattr(other, name))

    def add(
        self, window: NDArray[np.int64], dense: NDArray[np.float32], sparse: NDArray[np.float32]
    ) -> None:
        """Add a window `[L]` with both models' logits `[L, V]`."""
        targets = window[1:]

        def block(start: int) -> _Block:
            rows = slice(start, min(start + _ROWS, len(targets)))
            return _Block.of(targets[rows], dense[rows], sparse[rows])

        # NumPy computes a block on one thread, and lets others compute meanwhile.
        with ThreadPoolExecutor(physical_cores()) as pool:
            blocks = list(pool.map(block, range(0, len(targets), _ROWS)))
        self.add_blocks(blocks, late=prompt_length(window))

    def add_blocks(self, blocks: Sequence[_Block], *, late: int) -> None:
        """Add one window, block by block; from its token `late` on it is the second half."""
        for block in blocks:
            self.divergence.merge(block.divergence)
        for all_of_it, end, nll in (
            (self.dense, self.late_dense, np.concatenate([block.dense_nll for block in blocks])),
            (self.sparse, self.late_sparse, np.concatenate([block.sparse_nll for block in blocks])),
        ):
            all_of_it.add(nll)
            if nll[late:].size:
                end.add(nll[late:])


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A run of consecutive tokens of a window, scored."""

    dense_nll: NDArray[np.float64]
    sparse_nll: NDArray[np.float64]
    divergence: DivergenceSum

    @classmethod
    def of(
        cls, targets: NDArray[np.int64], dense: NDArray[np.float32], sparse: NDArray[np.float32]
    ) -> Self:
        """Score tokens `[T]` by both models' logits `[T, V]`."""
        dense_rows, sparse_rows = log_softmax(dense), log_softmax(sparse)
        divergence = DivergenceSum()
        divergence.add(dense_rows, sparse_rows)
        return cls(
            dense_nll=token_nll(dense_rows, targets),
            sparse_nll=token_nll(sparse_rows, targets),
            divergence=divergence,
        )


class LateLogits:
    """Dense logits of second halves of windows, kept from one scoring for the next."""

    def __init__(self, most_bytes: int) -> None:
        """Start empty; keep at most `most_bytes`."""
        self._free = most_bytes
        self._kept: dict[bytes, NDArray[np.float32]] = {}

    def offer(self, window: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Keep the logits of a window's second half, out of `[L, V]`, if there is room."""
        late, key = logits[prompt_length(window) :], window.tobytes()
        if late.nbytes <= self._free and key not in self._kept:
            self._free -= late.nbytes
            self._kept[key] = late.copy()

    def take(self, window: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return the kept logits `[L - L // 2, V]` of a window `[L]`; None where there are none."""
        late = self._kept.pop(window.tobytes(), None)
        self._free += 0 if late is None else late.nbytes
        return late


def prompt_length(window: NDArray[np.int64]) -> int:
    """Return the number of prompt tokens of a window `[L]` where decoding is scored."""
    return len(window) // 2


def protocol(phases: ModelPhases) -> str:
    """Describe how `compare` measures."""
    windows = {"decode": _DECODED, "mixed": _MIXED}.get(phases, _WHOLE)
    return windows + _FIGURES


def compare(
    dense: Session,
    sparse: Session,
    windows: Iterable[NDArray[np.int64]],
    *,
    phases: ModelPhases = "all",
    late: LateLogits | None = None,
) -> Accuracy:
    """Score both models on windows `[L]` of token ids, L at least 2.

    A model that is sparse in decode only is dense on a prompt, and one whose linears differ is
    another than in decode: such a model is scored on the second half of each window, read token by
    token.

    Args:
        dense: The baseline.
        sparse: The sparse model.
        windows: Windows of token ids.
        phases: When the sparse model is sparse.
        late: Keeps dense logits for `decode_only`.

    Returns:
        The scores, for the report's `accuracy`.
    """
    scores = (score_window(dense, sparse, window, phases=phases, late=late) for window in windows)
    return figures(scores, phases=phases)


def score_window(
    dense: Session,
    sparse: Session,
    window: NDArray[np.int64],
    *,
    phases: ModelPhases = "all",
    late: LateLogits | None = None,
) -> WindowComparison:
    """Score both models on one window `[L]`; see `compare`."""
    score = WindowComparison()
    logits = dense.prefill(window[None, :])[0]
    if late is not None:
        late.offer(window, logits)
    targets, sparse_logits = run_window(sparse, window, phases=phases)
    prompt = len(window) - 1 - len(targets)
    score.add(window[prompt:], logits[prompt:], sparse_logits)
    return score


def run_window(
    sparse: Session, window: NDArray[np.int64], *, phases: ModelPhases
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Run a window `[L]`; return the tokens to score `[T]`, and logits `[T or T + 1, V]`."""
    if phases not in _STEPWISE:
        return window[1:], sparse.prefill(window[None, :])[0]
    prompt = prompt_length(window)
    if sparse.decodes_second_half:
        return window[prompt + 1 :], sparse.prefill(window[None, :])[0, prompt:]
    return window[prompt + 1 :], _teacher_forced(sparse, window, prompt)


def figures(scores: Iterable[WindowComparison], *, phases: ModelPhases = "all") -> Accuracy:
    """Make the report's figures of windows that were scored one by one."""
    sums = WindowComparison()
    for score in scores:
        sums.merge(score)
    return Accuracy(
        **vars(_scores(sums)),
        second_half=None if phases in _STEPWISE else _second_half(sums),
    )


def decode_only(
    dense: Session,
    sparse: Session,
    windows: Sequence[NDArray[np.int64]],
    *,
    late: LateLogits,
    progress: Progress,
    label: str,
) -> Scores:
    """Score sparsity in decode only, with a model that is sparse in all phases.

    The dense model reads each batch's prompts, the sparse one goes on from the dense cache, token
    by token: what a server gets that runs prompts dense. In one piece it would be faster, but other
    last bits of attention decide other near ties: on SmolLM2 that moved the figure by 2 %.

    Args:
        dense: The baseline.
        sparse: The sparse model.
        windows: Batches `[B, L]` of windows of token ids.
        late: Dense logits that `compare` kept of these windows; the rest is computed again.
        progress: Counts decode steps.
        label: What it counts them under.

    Returns:
        The report's `accuracy.decode_only`; figures are None, with `why`, where caches cannot be
        handed over.
    """
    if not (dense.exposes_cache and sparse.exposes_cache):
        return Scores(why="this runtime's caches cannot be handed over")
    sums = WindowComparison()
    total = sum(batch.shape[1] - 1 - prompt_length(batch[0]) for batch in windows)
    steps = (step for batch in windows for step in _add_decoded(sums, dense, sparse, batch, late))
    for _ in progress.track(steps, label=label, total=total):
        pass
    return replace(_scores(sums), protocol=_HANDED_OVER)


def _add_decoded(
    sums: WindowComparison,
    dense: Session,
    sparse: Session,
    batch: NDArray[np.int64],
    late: LateLogits,
) -> Iterator[None]:
    """Score a batch of windows `[B, L]` on their second halves, a step at a time."""
    prompt = prompt_length(batch[0])
    # Logits are most of the memory: dense ones are kept of what is scored, sparse ones until then.
    dense_logits = [_late_logits(dense, window, late) for window in batch]
    dense.prefill(batch[:, :prompt])
    sparse.cache = sparse.resume(dense.keep(dense.cache))
    targets = batch[:, prompt + 1 :]
    blocks: list[list[_Block]] = [[] for _ in batch]
    with ThreadPoolExecutor(physical_cores()) as pool:
        for start in range(0, targets.shape[1], _ROWS):
            rows = slice(start, min(start + _ROWS, targets.shape[1]))
            decoded = []
            for at in range(rows.start, rows.stop):
                decoded.append(sparse.decode_step(batch[:, prompt + at, None]))
                yield
            sparse_logits = np.concatenate(decoded, axis=1)
            scored = pool.map(
                _Block.of,
                targets[:, rows],
                (logits[rows] for logits in dense_logits),
                sparse_logits,
            )
            for block, so_far in zip(scored, blocks, strict=True):
                so_far.append(block)
    for window in blocks:
        sums.add_blocks(window, late=targets.shape[1])


def _late_logits(
    dense: Session, window: NDArray[np.int64], late: LateLogits
) -> NDArray[np.float32]:
    kept = late.take(window)
    return dense.prefill(window[None])[0, prompt_length(window) :].copy() if kept is None else kept


def _scores(sums: WindowComparison) -> Scores:
    return Scores(
        tokens=sums.dense.tokens,
        windows=len(sums.dense.window_tokens),
        dense=likelihood(sums.dense),
        sparse=likelihood(sums.sparse),
        perplexity_ratio=math.exp(sums.sparse.mean - sums.dense.mean),
        perplexity_ratio_stderr=ratio_stderr(sums.dense, sums.sparse),
        kl_mean=sums.divergence.kl_mean,
        top1_agreement=sums.divergence.top1_agreement,
    )


def _second_half(sums: WindowComparison) -> Scores | None:
    """Score the tokens that `decode_only` scores, so that the two can be compared."""
    dense, sparse = sums.late_dense, sums.late_sparse
    if not dense.tokens:
        return None
    return Scores(
        tokens=dense.tokens,
        dense=Likelihood(perplexity=dense.perplexity),
        sparse=Likelihood(perplexity=sparse.perplexity),
        perplexity_ratio=math.exp(sparse.mean - dense.mean),
        perplexity_ratio_stderr=ratio_stderr(dense, sparse),
    )


def _teacher_forced(
    session: Session, window: NDArray[np.int64], prompt: int
) -> NDArray[np.float32]:
    """Compute the logits `[L - 1 - prompt, V]` of the tokens after the prompt, but for the last."""
    session.prefill(window[None, :prompt])
    steps = [session.decode_step(token[None, None])[0, 0] for token in window[prompt:-1]]
    return np.stack(steps)


def likelihood(sums: NllSum) -> Likelihood:
    """Make one model's figures."""
    return Likelihood(
        perplexity=sums.perplexity, nll_mean=sums.mean, window_nll_mean=tuple(sums.window_means)
    )
