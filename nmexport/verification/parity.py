"""Compares what executors compute: torch, ONNX function bodies, native op."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nmexport.report.model import Parity, ParityLeg

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

    Logits = dict[str, NDArray[np.float32]]

TORCH = "torch"
ROUNDED = "torch_rounded"
"""Torch once more, with embeddings off in their last bits: what rounding alone does. It is the
latter half of one batch with `TORCH`, which takes two thirds of the time of two."""
ONNX = "onnx"
ENGINE = "engine"
EXECUTORS = (TORCH, ONNX, ENGINE)
LEGS = ((TORCH, ONNX), (TORCH, ENGINE), (ONNX, ENGINE))
NOISE_LEG = (TORCH, ROUNDED)

# Executors in a half type round at other places than torch does, so they may agree a little less
# than torch with itself; a wrong model agrees hardly at all.
_UNEXPLAINED = 0.2

PROTOCOL = (
    "The executors run in lock step: the same prompts, then decode on the cache, each step reading "
    "the greedy tokens of the first executor. max_abs is the largest difference of two logits over "
    "all prompt tokens and steps; the greedy tokens of a pair are identical exactly when they "
    "agree on the last prompt token and at every step. Where two scores are nearly equal, rounding "
    "decides which channel is kept, and everything after differs visibly: so the noise floor "
    "is compared with, torch against itself with its embeddings off by one part in ten million, or "
    "in a half type by half a unit in the last place. "
    "median_abs is the median over tokens of the largest difference of a token's logits."
)


@dataclass
class Leg:
    """Running comparison of two executors."""

    agreeing: int = 0
    tokens: int = 0
    token_abs: list[float] = field(default_factory=list)
    """Largest difference of each token's logits."""
    diverged: list[bool] = field(default_factory=list)
    """For each prompt: did the greedy tokens ever differ."""

    def add(self, left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Add logits `[B, S, V]`; the last of S is where the next token is chosen."""
        self.token_abs += _token_abs(left, right)
        same = left.argmax(axis=-1) == right.argmax(axis=-1)
        self.agreeing += int(same.sum())
        self.tokens += same.size
        chosen = [not agrees for agrees in same[:, -1].tolist()]
        before = self.diverged or [False] * len(chosen)
        self.diverged = [old or new for old, new in zip(before, chosen, strict=True)]

    def report(self) -> ParityLeg:
        """Make the report's figures."""
        return ParityLeg(
            max_abs=max(self.token_abs),
            median_abs=statistics.median(self.token_abs),
            top1_agreement=self.agreeing / self.tokens,
            greedy_identical=not any(self.diverged),
            prompts_diverged=sum(self.diverged),
            prompts=len(self.diverged),
            tokens=self.tokens,
        )


def _token_abs(left: NDArray[np.float32], right: NDArray[np.float32]) -> list[float]:
    # A prompt at a time: the difference of a whole batch would be as large as both together.
    pairs = zip(left, right, strict=True)
    return [value for a, b in pairs for value in np.abs(a - b).max(axis=-1).tolist()]


def compare(
    executors: Mapping[str, Session],
    prompts: NDArray[np.int64],
    steps: Iterable[int],
    *,
    why_absent: Mapping[str, str],
    twins: bool = False,
) -> Parity:
    """Run the executors in lock step on prompts `[B, P]`.

    Args:
        executors: Open sessions under names of `EXECUTORS`; absent ones are left out.
        prompts: Token ids, all prompts of one length.
        steps: One item for each decode step.
        why_absent: For each executor left out, the reason.
        twins: The session under `TORCH` disturbs the latter half of its batch: it is handed all
            sequences twice, which measures the noise floor.

    Returns:
        Each of `LEGS`, the noise floor, and the protocol.
    """
    present = {*executors, ROUNDED} if twins else {*executors}
    running = [names for names in (*LEGS, NOISE_LEG) if present.issuperset(names)]
    legs = {names: Leg() for names in running}
    if running:
        _lock_step(executors, prompts, steps, legs, twins=twins)
    noise = legs.get(NOISE_LEG)

    def figures(left: str, right: str) -> ParityLeg:
        leg = legs.get((left, right))
        if leg is not None:
            return leg.report()
        missing = next((name for name in (left, right) if name not in executors), "")
        return ParityLeg(why=why_absent[missing])

    return Parity(
        noise_floor=noise.report() if noise else None,
        torch_onnx=figures(TORCH, ONNX),
        torch_engine=figures(TORCH, ENGINE),
        onnx_engine=figures(ONNX, ENGINE),
        protocol=PROTOCOL,
    )


def concerns(parity: Parity) -> list[str]:
    """Say in a report where executors disagree."""
    sentences = []
    dense, floor = parity.dense, parity.noise_floor
    if dense is not None and dense.error is None and dense.why:
        sentences.append(f"The dense ONNX file was not held against torch: {dense.why}.")
    if floor is None or floor.top1_agreement is None:
        return sentences
    legs = (parity.torch_onnx, parity.torch_engine, parity.onnx_engine)
    for (left, right), leg in zip(LEGS, legs, strict=True):
        agreement = leg.top1_agreement
        if agreement is not None and agreement < floor.top1_agreement - _UNEXPLAINED:
            sentences.append(
                f"Executors disagree: {left} and {right} choose the same token at "
                f"{agreement:.1%} of positions, where rounding alone leaves "
                f"{floor.top1_agreement:.1%}. The figures of this report do not describe the "
                "model in torch."
            )
    return sentences


def _lock_step(
    executors: Mapping[str, Session],
    prompts: NDArray[np.int64],
    steps: Iterable[int],
    legs: Mapping[tuple[str, str], Leg],
    *,
    twins: bool,
) -> None:
    def run(ids: NDArray[np.int64], *, first: bool = False) -> Logits:
        logits: Logits = {}
        for name, session in executors.items():
            forward = session.prefill if first else session.decode_step
            if twins and name == TORCH:
                logits[TORCH], logits[ROUNDED] = np.split(forward(np.concatenate([ids, ids])), 2)
            else:
                logits[name] = forward(ids)
        return logits

    leader = next(name for name in EXECUTORS if name in executors)
    logits = run(prompts, first=True)
    _add(legs, logits)
    for _ in steps:
        chosen = logits[leader][:, -1:].argmax(axis=-1).astype(np.int64)
        logits = run(chosen)
        _add(legs, logits)


def _add(legs: Mapping[tuple[str, str], Leg], logits: Logits) -> None:
    for (left, right), leg in legs.items():
        leg.add(logits[left], logits[right])
