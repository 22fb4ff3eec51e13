"""Thresholds on a report's figures, and their outcome for people and for CI."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from nmexport.errors import ArtifactError, RecipeError
from nmexport.report.model import GateResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nmexport.recipe import GatesSection
    from nmexport.report.model import Accuracy, Report, Speedup, Verdict

    _Figure = tuple[float | None, str | None]


@dataclass(frozen=True)
class _Gate:
    """The figure that a gate looks at, and on which side of the limit it must be."""

    figure: str
    """Its name in the report."""
    read: Callable[[Report], _Figure]
    """The figure, and why there is none."""
    holds: Callable[[float, float], bool]
    relation: str


def _accuracy(read: Callable[[Accuracy], float | None]) -> Callable[[Report], _Figure]:
    return lambda report: (read(report.accuracy), report.accuracy.why)


def _speedup(read: Callable[[Speedup], float | None]) -> Callable[[Report], _Figure]:
    return lambda report: (
        read(report.latency.speedup),
        report.latency.speedup.why or report.latency.why,
    )


_GATES: Mapping[str, _Gate] = {
    "max_perplexity_ratio": _Gate(
        "accuracy.perplexity_ratio",
        _accuracy(lambda accuracy: accuracy.perplexity_ratio),
        operator.le,
        "at most",
    ),
    "max_kl_mean": _Gate(
        "accuracy.kl_mean", _accuracy(lambda accuracy: accuracy.kl_mean), operator.le, "at most"
    ),
    "min_top1_agreement": _Gate(
        "accuracy.top1_agreement",
        _accuracy(lambda accuracy: accuracy.top1_agreement),
        operator.ge,
        "at least",
    ),
    "min_decode_speedup": _Gate(
        "latency.speedup.decode", _speedup(lambda speedup: speedup.decode), operator.ge, "at least"
    ),
    "min_prefill_speedup": _Gate(
        "latency.speedup.prefill",
        _speedup(lambda speedup: speedup.prefill),
        operator.ge,
        "at least",
    ),
    "max_peak_rss_bytes": _Gate(
        "memory.peak_rss_bytes",
        lambda report: (report.memory.peak_rss_bytes, report.memory.why),
        operator.le,
        "at most",
    ),
}


def evaluate(report: Report, gates: GatesSection) -> list[GateResult]:
    """Compare every gate that is set with the report.

    A figure that was not measured fails its gate: silence is not a pass.
    """
    limits = gates.model_dump()
    return [
        _result(name, gate, limits[name], report)
        for name, gate in _GATES.items()
        if limits[name] is not None
    ]


def limits_from(limits: Mapping[str, float]) -> GatesSection:
    """Make gates from bare limits.

    Raises:
        RecipeError: if one is out of range.
    """
    from pydantic import ValidationError

    from nmexport.recipe import GatesSection

    try:
        return GatesSection.model_validate(dict(limits))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"--{name} cannot be {first['input']}.", allowed=first["msg"]) from None


def limits_of_report(report: Report) -> GatesSection:
    """Return the gates that a report was made with.

    Raises:
        ArtifactError: if the report says that a gate failed, and not which.
    """
    limits = {gate.name: gate.limit for gate in report.gates}
    if not limits and report.verdict == "fail":
        raise ArtifactError(
            "The report's verdict is fail, and it does not say which gate failed.",
            fix="make it again with `nmexport verify`, or give thresholds",
        )
    return limits_from(limits)


def verdict(results: Sequence[GateResult]) -> Verdict:
    """`pass` or `fail`; `none` where no gate was set."""
    if not results:
        return "none"
    return "pass" if all(result.passed for result in results) else "fail"


def junit_xml(results: Sequence[GateResult], *, suite: str = "nmexport") -> str:
    """Write JUnit XML with one test case a gate."""
    failures = sum(not result.passed for result in results)
    root = ET.Element("testsuites")
    element = ET.SubElement(
        root, "testsuite", name=suite, tests=str(len(results)), failures=str(failures)
    )
    for result in results:
        case = ET.SubElement(element, "testcase", classname=f"{suite}.gates", name=result.name)
        if not result.passed:
            failure = ET.SubElement(case, "failure", message=result.why or "", type="GateFailed")
            failure.text = f"limit {result.limit:g}, value {_number(result.value)}"
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(results: Sequence[GateResult]) -> str:
    """Write a summary for a pull request."""
    lines = [f"## Gates: {verdict(results)}", ""]
    if not results:
        lines.append("No gate is set.")
    else:
        lines += ["| gate | limit | value | |", "|---|---:|---:|---|"]
        lines += [
            f"| {result.name} | {result.limit:g} | {_number(result.value)} | "
            f"{'pass' if result.passed else f'**fail**: {result.why}'} |"
            for result in results
        ]
    return "\n".join(lines) + "\n"


def _result(name: str, gate: _Gate, limit: float, report: Report) -> GateResult:
    value, absence = gate.read(report)
    if value is None:
        reason = f" ({absence})" if absence else ""
        why = f"{gate.figure} was not measured{reason}"
        return GateResult(name=name, limit=limit, value=None, passed=False, why=why)
    passed = bool(gate.holds(value, limit))
    fault = f"{gate.figure} is {value:g}, {gate.relation} {limit:g} is asked for"
    return GateResult(
        name=name, limit=limit, value=float(value), passed=passed, why=None if passed else fault
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"
