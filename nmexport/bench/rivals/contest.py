"""The contest itself: every contestant runs every case, in turns where all fit into memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nmexport.report.model import ContestantTimes
from nmexport.timing import interleave, milliseconds
from nmexport.verification.latency import (
    QUEUED_ROUNDS,
    QUEUED_STEPS,
    host_us,
    middle,
    summary,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nmexport.bench.rivals.interface import Case, Contestant, Entry, Step
    from nmexport.progress import Progress

_REASON_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Contest:
    """The cases, and how many runs each has."""

    cases: Sequence[Case]
    runs: int
    """Counted runs of each contestant and case."""
    warmup: int
    progress: Progress
    done: Callable[[tuple[ContestantTimes, ...]], None]
    """Takes the times of a case as soon as it is through: a long run may be cut short."""


@dataclass
class _Opened:
    """Contestants in memory, and why others are not."""

    contestants: dict[Entry, Contestant]
    reasons: dict[Entry, str]


def hold(contest: Contest, groups: Sequence[Sequence[Entry]]) -> None:
    """Run all cases, group after group; contestants of a group take turns.

    A rival that fails is a row with the reason: a missing compiler is no reason to lose the other
    figures. One of ours that fails raises.
    """
    for group in groups:
        with contextlib.ExitStack() as stack:
            opened = _open(group, stack)
            for case in contest.cases:
                contest.done(_run_case(contest, case, opened))


def over_rival(times: Sequence[ContestantTimes]) -> tuple[ContestantTimes, ...]:
    """Add to each row how it compares with the fastest dense rival of its case."""
    best: dict[tuple[str, int, int], float] = {}
    for row in times:
        if row.is_rival and row.is_dense and row.p50_ms is not None:
            case = (row.phase, row.batch, row.tokens)
            best[case] = min(row.p50_ms, best.get(case, row.p50_ms))
    return tuple(_with_ratio(row, best.get((row.phase, row.batch, row.tokens))) for row in times)


def _with_ratio(row: ContestantTimes, best_ms: float | None) -> ContestantTimes:
    if best_ms is None or row.p50_ms is None:
        return row
    return replace(row, over_rival=best_ms / row.p50_ms)


def _open(group: Sequence[Entry], stack: contextlib.ExitStack) -> _Opened:
    opened = _Opened({}, {})
    for entry in group:
        with _reasons_of_rivals(entry, opened.reasons):
            opened.contestants[entry] = stack.enter_context(entry.open())
    return opened


def _run_case(contest: Contest, case: Case, opened: _Opened) -> tuple[ContestantTimes, ...]:
    steps: dict[Entry, Step] = {}
    reasons = dict(opened.reasons)
    try:
        for entry, contestant in opened.contestants.items():
            with _reasons_of_rivals(entry, reasons):
                step = contestant.prepare(case)
                if step is not None:
                    steps[entry] = step
        times = _time_case(contest, case, steps)
    finally:
        steps.clear()
        for contestant in opened.contestants.values():
            contestant.release()
    return (*times, *(_failure(entry, case, why) for entry, why in reasons.items()))


def _time_case(
    contest: Contest, case: Case, steps: Mapping[Entry, Step]
) -> tuple[ContestantTimes, ...]:
    if not steps:
        return ()
    tracked = contest.progress.track(range(contest.runs), label=f"{case}", total=contest.runs)
    walls = interleave(
        {entry: _timing(step) for entry, step in steps.items()}, tracked, warmup=contest.warmup
    )
    device = interleave(
        {entry: _device_timing(step) for entry, step in steps.items()},
        range(QUEUED_ROUNDS),
        warmup=0,
    )
    tokens = case.batch * (1 if case.phase == "decode" else case.tokens)
    rows = []
    for entry in steps:
        wall, device_ms = summary(walls[entry], tokens=tokens), middle(device[entry])
        rows.append(
            ContestantTimes(
                name=entry.name,
                is_rival=entry.is_rival,
                is_dense=entry.is_dense,
                **vars(case),
                **vars(wall),
                device_ms=device_ms,
                host_us=host_us(wall, device_ms),
            )
        )
    return tuple(rows)


def _timing(step: Step) -> Callable[[], float]:
    return lambda: milliseconds(step.run)


def _device_timing(step: Step) -> Callable[[], float | None]:
    return lambda: step.device_ms(QUEUED_STEPS)


def _failure(entry: Entry, case: Case, why: str) -> ContestantTimes:
    return ContestantTimes(
        name=entry.name,
        is_rival=entry.is_rival,
        is_dense=entry.is_dense,
        **vars(case),
        why=why,
    )


@contextlib.contextmanager
def _reasons_of_rivals(entry: Entry, reasons: dict[Entry, str]) -> Iterator[None]:
    """Note why a rival fails; what is ours must not."""
    try:
        yield
    except Exception as error:
        if not entry.is_rival:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        reasons[entry] = reason[:_REASON_CHARACTERS]
