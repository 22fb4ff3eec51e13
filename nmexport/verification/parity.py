"""Do the executors compute the same thing: torch, ONNX function bodies, native op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

TORCH = "torch"
ONNX = "onnx"
ENGINE = "engine"
EXECUTORS = (TORCH, ONNX, ENGINE)
LEGS = ((TORCH, ONNX), (TORCH, ENGINE), (ONNX, ENGINE))

PROTOCOL = (
    "The executors run in lock step: the same prompts, then decode on the cache, each step reading "
    "the greedy tokens of the first executor. max_abs is the largest difference of two logits over "
    "all prompt tokens and steps; the greedy tokens of a pair are identical exactly when they "
    "agree on the last prompt token and at every step."
)


@dataclass
class Leg:
    """Running comparison of two executors."""

    max_abs: float = 0.0
    agreeing: int = 0
    tokens: int = 0
    diverged: list[bool] = field(default_factory=list)
    """For each prompt: did the greedy tokens ever differ."""

    def add(self, left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
        """Add logits `[B, S, V]`; the last of S is where the next token is chosen."""
        self.max_abs = max(self.max_abs, _max_abs(left, right))
        same = left.argmax(axis=-1) == right.argmax(axis=-1)
        self.agreeing += int(same.sum())
        self.tokens += same.size
        chosen = [not agrees for agrees in same[:, -1].tolist()]
        before = self.diverged or [False] * len(chosen)
        self.diverged = [old or new for old, new in zip(before, chosen, strict=True)]

    def report(self) -> dict[str, Any]:
        """The report's form."""
        return {
            "max_abs": self.max_abs,
            "top1_agreement": self.agreeing / self.tokens,
            "greedy_identical": not any(self.diverged),
            "prompts_diverged": sum(self.diverged),
            "prompts": len(self.diverged),
            "tokens": self.tokens,
        }


def _max_abs(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    # A prompt at a time: the difference of a whole batch would be as large as both together.
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def absent_leg(why: str) -> dict[str, Any]:
    """A leg that could not run."""
    return {"max_abs": None, "top1_agreement": None, "why": why}


def compare(
    executors: Mapping[str, Session],
    prompts: NDArray[np.int64],
    steps: Iterable[int],
    *,
    why_absent: Mapping[str, str],
) -> dict[str, Any]:
    """Run the executors in lock step on prompts `[B, P]`.

    Args:
        executors: Open sessions under names of `EXECUTORS`; absent ones are left out.
        prompts: Token ids, all prompts of one length.
        steps: One item for each decode step.
        why_absent: For each executor left out, the reason.

    Returns:
        The report's `parity`: one entry for each of `LEGS`, and the protocol.
    """
    running = [(left, right) for left, right in LEGS if left in executors and right in executors]
    legs = {names: Leg() for names in running}
    if running:
        _lock_step(executors, prompts, steps, legs)
    report: dict[str, Any] = {}
    for left, right in LEGS:
        leg = legs.get((left, right))
        missing = next((name for name in (left, right) if name not in executors), "")
        report[f"{left}_{right}"] = leg.report() if leg else absent_leg(why_absent[missing])
    return {**report, "protocol": PROTOCOL}


def _lock_step(
    executors: Mapping[str, Session],
    prompts: NDArray[np.int64],
    steps: Iterable[int],
    legs: Mapping[tuple[str, str], Leg],
) -> None:
    tokens = prompts
    logits = {name: session.prefill(tokens) for name, session in executors.items()}
    _add(legs, logits)
    leader = next(name for name in EXECUTORS if name in executors)
    for _ in steps:
        tokens = logits[leader][:, -1:].argmax(axis=-1).astype(np.int64)
        logits = {name: session.decode_step(tokens) for name, session in executors.items()}
        _add(legs, logits)


def _add(legs: Mapping[tuple[str, str], Leg], logits: Mapping[str, NDArray[np.float32]]) -> None:
    for (left, right), leg in legs.items():
        leg.add(logits[left], logits[right])
