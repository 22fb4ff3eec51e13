"""What could hurt: a gate that passes on a figure nobody measured."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from nmexport.errors import RecipeError
from nmexport.recipe import GatesSection
from nmexport.report import gates
from nmexport.report.model import report_from

REPORT = {
    "schema": 1,
    "accuracy": {"perplexity_ratio": 1.9, "kl_mean": 0.4, "top1_agreement": 0.7},
    "latency": {"speedup": {"prefill": 0.9, "decode": 1.5}},
    "memory": {"peak_rss_bytes": 1000},
}


def only(report: dict, **limits: float) -> gates.GateResult:
    whole = report_from({"verdict": "none", **report})
    (result,) = gates.evaluate(whole, GatesSection.model_validate(limits))
    return result


@pytest.mark.parametrize(
    ("name", "at", "beyond"),
    [
        ("max_perplexity_ratio", 1.9, 1.899),
        ("max_kl_mean", 0.4, 0.399),
        ("min_top1_agreement", 0.7, 0.701),
        ("min_decode_speedup", 1.5, 1.501),
        ("min_prefill_speedup", 0.9, 0.901),
        ("max_peak_rss_bytes", 1000, 999),
    ],
)
def test_each_gate_holds_at_its_limit_and_fails_beyond(name: str, at: float, beyond: float) -> None:
    assert only(REPORT, **{name: at}).passed
    failed = only(REPORT, **{name: beyond})
    assert not failed.passed
    assert "asked for" in str(failed.why)


def test_every_gate_of_the_recipe_is_known() -> None:
    assert set(GatesSection.model_fields) == set(gates._GATES)


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"latency": None},
        {"latency": {"speedup": None}},
        {"latency": {"speedup": {"decode": None}}},
    ],
)
def test_a_figure_that_was_not_measured_fails(report: dict) -> None:
    result = only(report, min_decode_speedup=0.1)
    assert not result.passed
    assert result.value is None
    assert result.why


@pytest.mark.parametrize("value", ["fast", True, [1.5]])
def test_a_figure_that_is_no_number_is_no_report(value: object) -> None:
    with pytest.raises(ValueError, match=r"latency\.speedup\.decode is .*, not a number"):
        only({"latency": {"speedup": {"decode": value}}}, min_decode_speedup=0.1)


def test_the_reports_own_reason_is_passed_on() -> None:
    report = {"latency": {"speedup": {"decode": None}, "why": "no engine here"}}
    assert "no engine here" in str(only(report, min_decode_speedup=1).why)


def test_verdicts() -> None:
    good, bad = only(REPORT, max_kl_mean=1), only(REPORT, max_kl_mean=0)
    assert gates.verdict([]) == "none"
    assert gates.verdict([good]) == "pass"
    assert gates.verdict([good, bad]) == "fail"


def test_junit_is_xml_that_counts() -> None:
    results = [only(REPORT, max_kl_mean=1), only({}, min_decode_speedup=1.2)]
    suite = ET.fromstring(gates.junit_xml(results)).find("testsuite")  # noqa: S314  our own text
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite] == ["max_kl_mean", "min_decode_speedup"]
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert "not measured" in str(failure.get("message"))


def test_markdown_says_which_failed_and_why() -> None:
    text = gates.markdown([only(REPORT, max_kl_mean=0.1)])
    assert "Gates: fail" in text
    assert "**fail**: accuracy.kl_mean is 0.4" in text
    assert "No gate is set" in gates.markdown([])


def test_limits_out_of_range_name_the_option() -> None:
    with pytest.raises(RecipeError, match="--min-top1-agreement cannot be 2"):
        gates.limits_from({"min_top1_agreement": 2.0})
    assert gates.limits_from({"max_kl_mean": 1.0}).max_kl_mean == 1.0
