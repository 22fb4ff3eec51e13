"""The contest: turns, ratios, and what happens to those that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nmexport.bench.rivals.contest import Contest, hold, over_rival
from nmexport.bench.rivals.interface import Case, Contestant, Entry, Step
from nmexport.progress import Silent
from nmexport.report.model import ContestantTimes

if TYPE_CHECKING:
    from collections.abc import Callable

DECODE = Case(phase="decode", batch=4, tokens=64)
PROMPT = Case(phase="prefill", batch=1, tokens=16)


class Recorded(Contestant, Step):
    """Writes down what happens to it; its device time is fixed."""

    def __init__(self, name: str, events: list[str], **faults: Exception) -> None:
        self.name, self.events, self.faults = name, events, faults
        self.log("open")

    def log(self, event: str) -> None:
        self.events.append(f"{self.name} {event}")
        if event in self.faults:
            raise self.faults[event]

    def prepare(self, case: Case) -> Step | None:
        self.log(case.phase)
        return None if (self.name, case.phase) == ("int8", "prefill") else self

    def run(self) -> None:
        self.log("run")

    def device_ms(self, times: int) -> float | None:
        self.log("queue")
        return 0.25 if self.name == "dense" else None

    def release(self) -> None:
        self.log("release")

    def close(self) -> None:
        self.log("close")


def entry(name: str, open_: Callable[[], Contestant]) -> Entry:
    is_rival = name in {"dense", "int8"}
    return Entry(name=name, is_rival=is_rival, is_dense=name == "dense", weight_bytes=1, open=open_)


def held(groups: list[list[Entry]], *cases: Case) -> list[ContestantTimes]:
    rows: list[ContestantTimes] = []
    contest = Contest(cases=cases, runs=3, warmup=1, progress=Silent(), done=rows.extend)
    hold(contest, groups)
    return rows


def test_contestants_take_turns_and_are_released_after_each_case() -> None:
    events: list[str] = []
    names = ("ours", "dense", "int8")
    entries = [entry(name, lambda name=name: Recorded(name, events)) for name in names]
    rows = held([entries], DECODE, PROMPT)
    assert [(row.name, row.phase, row.runs) for row in rows] == [
        *((name, "decode", 3) for name in names),
        *((name, "prefill", 3) for name in names[:2]),
    ]
    runs = [event for event in events if event.endswith("run")][3:12]
    assert runs == [
        f"{name} run" for start in range(3) for name in (*names[start:], *names[:start])
    ]
    assert events.index("ours release") > events.index("int8 run")
    assert events.index("ours prefill") > events.index("int8 release")
    assert events[-3:] == [f"{name} close" for name in reversed(names)]
    ours, dense, _ = rows[:3]
    assert (ours.device_ms, ours.host_us) == (None, None)
    assert dense.p50_ms is not None
    assert dense.device_ms == 0.25
    assert dense.host_us == pytest.approx((dense.p50_ms - 0.25) * 1e3)
    assert dense.tokens_per_s == pytest.approx(4e3 / dense.p50_ms)


def test_a_group_is_closed_before_the_next_opens() -> None:
    events: list[str] = []
    groups = [[entry(name, lambda name=name: Recorded(name, events))] for name in ("ours", "dense")]
    held(groups, DECODE)
    assert events.index("ours close") < events.index("dense open")


@pytest.mark.parametrize("when", ["open", "decode"])
def test_a_rival_that_fails_is_a_row_with_the_reason(when: str) -> None:
    events: list[str] = []
    fault = RuntimeError("no C compiler\nand a long trace")
    entries = [
        entry("ours", lambda: Recorded("ours", events)),
        entry("dense", lambda: Recorded("dense", events, **{when: fault})),
    ]
    ours, dense = held([entries], DECODE)
    assert ours.runs == 3
    assert dense.why == "RuntimeError: no C compiler"
    assert dense.p50_ms is None


def test_one_of_ours_that_fails_ends_the_run_and_frees_the_others() -> None:
    events: list[str] = []
    entries = [
        entry("dense", lambda: Recorded("dense", events)),
        entry("ours", lambda: Recorded("ours", events, decode=RuntimeError("broken"))),
    ]
    with pytest.raises(RuntimeError, match="broken"):
        held([entries], DECODE)
    assert events[-4:] == ["dense release", "ours release", "ours close", "dense close"]


def times(name: str, p50_ms: float | None, tokens: int = 64) -> ContestantTimes:
    return ContestantTimes(
        name=name,
        is_rival=name != "ours",
        is_dense=name != "int8",
        phase="decode",
        batch=1,
        tokens=tokens,
        p50_ms=p50_ms,
    )


def test_ratios_are_over_the_fastest_dense_rival_of_the_same_case() -> None:
    rows = over_rival(
        [
            times("ours", 2.0),
            times("slow", 5.0),
            times("dense", 4.0),
            times("int8", 1.0),
            times("failed", None),
            times("ours", 2.0, tokens=9),
        ]
    )
    assert [row.over_rival for row in rows] == [2.0, 0.8, 1.0, 4.0, None, None]
