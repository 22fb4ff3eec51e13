"""Thresholds on a report's figures, and their outcome for people and for CI."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree as ET

from nmexport.errors import ArtifactError, RecipeError
from nmexport.recipe import GatesSection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


Verdict = Literal["pass", "fail", "none"]


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One threshold and what it met."""

    name: str
    limit: float
    value: float | None
    """The report's figure; None where it was not measured, which fails the gate."""
    passed: bool
    why: str | None = None
    """Why it failed, in words."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Gate:
    """Place of a gate's figure in the report, and the side of the limit it must be on."""

    path: tuple[str, ...]
    holds: Callable[[float, float], bool]
    relation: str


_GATES: Mapping[str, _Gate] = {
    "max_perplexity_ratio": _Gate(("accuracy", "perplexity_ratio"), operator.le, "at most"),
    "max_kl_mean": _Gate(("accuracy", "kl_mean"), operator.le, "at most"),
    "min_top1_agreement": _Gate(("accuracy", "top1_agreement"), operator.ge, "at least"),
    "min_decode_speedup": _Gate(("latency", "speedup", "decode"), operator.ge, "at least"),
    "min_prefill_speedup": _Gate(("latency", "speedup", "prefill"), operator.ge, "at least"),
    "max_peak_rss_bytes": _Gate(("memory", "peak_rss_bytes"), operator.le, "at most"),
}


def evaluate(report: Mapping[str, Any], gates: GatesSection) -> list[GateResult]:
    """Hold every gate that is set against the report.

    A figure that was not measured fails its gate: silence is not a pass.
    """
    limits = gates.model_dump()
    return [
        _result(name, gate, limits[name], report)
        for name, gate in _GATES.items()
        if limits[name] is not None
    ]


def limits_from(limits: Mapping[str, float]) -> GatesSection:
    """Gates from bare limits.

    Raises:
        RecipeError: if one is out of range.
    """
    from pydantic import ValidationError

    try:
        return GatesSection.model_validate(dict(limits))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"--{name} cannot be {first['input']}.", allowed=first["msg"]) from None


def limits_of_report(report: Mapping[str, Any]) -> GatesSection:
    """The gates that a report was made with.

    Raises:
        ArtifactError: if the report says that a gate failed, and not which.
    """
    rows = report.get("gates") or []
    try:
        limits = {row["name"]: row["limit"] for row in rows}
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"The report's gates cannot be read: {error!r}.") from error
    if not limits and report.get("verdict") == "fail":
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
    """One test case a gate, in the XML that CI systems read."""
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
    """A summary that a pull request can show."""
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


def _result(name: str, gate: _Gate, limit: float, report: Mapping[str, Any]) -> GateResult:
    value, absence = _figure(report, gate.path)
    if value is None:
        return GateResult(name=name, limit=limit, value=None, passed=False, why=absence)
    passed = bool(gate.holds(value, limit))
    where = ".".join(gate.path)
    why = None if passed else f"{where} is {value:g}, {gate.relation} {limit:g} is asked for"
    return GateResult(name=name, limit=limit, value=value, passed=passed, why=why)


def _figure(report: Mapping[str, Any], path: Sequence[str]) -> tuple[float | None, str]:
    """A figure of the report, or None and why there is none."""
    node: Any = report
    why = None
    for part in path:
        if not isinstance(node, dict) or node.get(part) is None:
            reason = f" ({why})" if why else ""
            return None, f"{'.'.join(path)} was not measured{reason}"
        why = node.get("why") or why
        node = node[part]
        if isinstance(node, dict):
            why = node.get("why") or why
    if isinstance(node, bool) or not isinstance(node, int | float):
        return None, f"{'.'.join(path)} is not a number: {node!r}"
    return float(node), ""


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"
