"""The table of rivals: each contestant's times, case by case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.report.figures import number, speedup

if TYPE_CHECKING:
    from nmexport.report.model import ContestantTimes, Rivals

_NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class RivalRow:
    """One contestant in one case, as text."""

    case: str
    name: str
    p50: str = _NOTHING
    p90: str = _NOTHING
    rate: str = _NOTHING
    device: str = _NOTHING
    host: str = _NOTHING
    ratio: str = _NOTHING
    why: str = ""


def rows(rivals: Rivals | None) -> list[RivalRow]:
    """Lay out the rows, those of a case together."""
    if rivals is None:
        return []
    cases = list(dict.fromkeys(case_of(times) for times in rivals.times))
    ordered = sorted(rivals.times, key=lambda times: cases.index(case_of(times)))
    return [_row(times) for times in ordered]


def words(rivals: Rivals | None) -> list[str]:
    """Say on what, and how, it was measured."""
    if rivals is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in rivals.versions.items())
    turns = "in turns" if rivals.together else "one after another: they do not fit together"
    return [
        f"{rivals.device}; {rivals.runtime}, {versions}; {rivals.runs} runs of each, {turns}.",
        rivals.protocol,
    ]


def case_of(times: ContestantTimes) -> str:
    """Name the case of a row."""
    if times.phase == "prefill":
        return f"prompt of {times.tokens} tokens"
    return f"decode, batch {times.batch}, context {times.tokens}"


def _row(times: ContestantTimes) -> RivalRow:
    if times.p50_ms is None:
        return RivalRow(case=case_of(times), name=times.name, why=times.why or "not measured")
    return RivalRow(
        case=case_of(times),
        name=times.name,
        p50=number(times.p50_ms),
        p90=_figure(times.p90_ms),
        rate=_figure(times.tokens_per_s),
        device=_figure(times.device_ms),
        host=_figure(times.host_us, 2),
        ratio=_NOTHING if times.over_rival is None else speedup(times.over_rival),
    )


def _figure(value: float | None, digits: int = 4) -> str:
    return _NOTHING if value is None else number(value, digits)
