"""Timing several sides against each other: one loop for every measurement, one percentile."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Side = TypeVar("Side")
    Sample = TypeVar("Sample")


def interleave(
    sides: Mapping[Side, Callable[[], Sample]], rounds: Iterable[object], *, warmup: int = 1
) -> dict[Side, list[Sample]]:
    """Run every side once a round; each round begins with the next side.

    What slows the machine down for a while then meets all sides alike.

    Args:
        sides: A call that runs a side once and returns what is measured.
        rounds: One item for each counted round.
        warmup: Rounds before, which do not count.

    Returns:
        What each side returned, in order of the rounds.
    """
    for _ in range(warmup):
        for run in sides.values():
            run()
    samples: dict[Side, list[Sample]] = {side: [] for side in sides}
    order = list(sides)
    for _ in rounds:
        for side in order:
            samples[side].append(sides[side]())
        order.append(order.pop(0))
    return samples


def rounds_lasting(seconds: float, *, at_least: int) -> Iterator[int]:
    """Count rounds until a time has passed since the first, and a number were run."""
    end = time.perf_counter() + seconds
    count = 0
    while count < at_least or time.perf_counter() < end:
        yield count
        count += 1


def milliseconds(run: Callable[[], object]) -> float:
    """Run once and return the milliseconds that it took."""
    began = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - began) / 1e6


def queued_milliseconds(
    start: Callable[[], object], wait: Callable[[], object], times: int
) -> float:
    """Start something `times` times, wait for all, and return the milliseconds of one."""

    def run() -> None:
        for _ in range(times):
            start()
        wait()

    return milliseconds(run) / times


def percentiles(samples: Sequence[float], ranks: Sequence[float]) -> list[float]:
    """Return percentiles of the samples, linear between neighbours.

    Raises:
        ValueError: if there is no sample or a rank is outside 0 to 100.
    """
    if len(samples) == 0 or not all(0 <= rank <= 100 for rank in ranks):  # noqa: PLR2004  percent
        raise ValueError(f"percentile {ranks} of {len(samples)} samples")
    return [float(value) for value in np.percentile(np.asarray(samples, np.float64), ranks)]


def median(samples: Sequence[float]) -> float:
    """Return the median."""
    return percentiles(samples, (50,))[0]
