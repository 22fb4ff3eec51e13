"""What the first screen says: the advice follows the figures, and says what it does not know."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nmexport.recipe import GatesSection, ModelSection, Recipe
from nmexport.report import pages
from nmexport.report.answer import CLOSE_RATIO, FAR_RATIO, LEAST_GAIN, Answer, answer
from nmexport.report.model import (
    Latency,
    LinearParity,
    Report,
    Scores,
    Speedup,
    StoredDense,
    Weights,
)

from tests.support.sample_allocation import sample_allocation
from tests.support.sample_report import sample_report

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return sample_report(tmp_path_factory.mktemp("answer"), layers=1)


def told(report: Report, ratio: float | None, gain: float | None, **more: Any) -> Answer:
    accuracy = replace(report.accuracy, perplexity_ratio=ratio)
    latency = replace(report.latency, speedup=Speedup(decode=gain, prefill=gain))
    return answer(replace(report, **{"accuracy": accuracy, "latency": latency, **more}))


@pytest.mark.parametrize(
    ("ratio", "gain", "advice", "headline"),
    [
        (1.0, 1.5, "keep", "Keep the sparse model"),
        (CLOSE_RATIO, LEAST_GAIN, "keep", "about as good"),
        (1.2, 1.5, "try", "Try it on your own task first"),
        (FAR_RATIO, 1.5, "try", "Try it"),
        (1.4, 1.5, "leave", "its text much worse"),
        (1.0, 1.0, "leave", "not faster"),
        (None, 1.5, "unknown", "quality was not compared"),
        (1.0, None, "unknown", "speed was not compared"),
    ],
)
def test_the_advice_follows_quality_and_speed(
    report: Report, ratio: float | None, gain: float | None, advice: str, headline: str
) -> None:
    said = told(report, ratio, gain)
    assert said.advice == advice
    assert headline in said.headline
    assert said.whom[0].startswith("For one user" if advice in {"keep", "try"} else "For nobody")


@given(
    ratio=st.floats(0.5, 10),
    gain=st.floats(0.1, 10),
    worse=st.floats(1, 3),
    slower=st.floats(1, 3),
)
def test_a_worse_or_slower_model_is_never_advised_more(
    report: Report, ratio: float, gain: float, worse: float, slower: float
) -> None:
    order = ("leave", "try", "keep")
    first = order.index(told(report, ratio, gain).advice)
    assert order.index(told(report, ratio * worse, gain / slower).advice) <= first


def test_a_failed_gate_or_a_wrong_engine_outweighs_every_figure(
    report: Report, tmp_path: Path
) -> None:
    recipe = Recipe(model=ModelSection(id="m"), gates=GatesSection(max_perplexity_ratio=1.2))
    failed = sample_report(tmp_path, layers=1, recipe=recipe)
    assert "misses what you asked for (max_perplexity_ratio)" in told(failed, 1.0, 2.0).headline
    linears = replace(report.parity.linears, engine=LinearParity(within_contract=False))
    wrong = told(report, 1.0, 2.0, parity=replace(report.parity, linears=linears))
    assert wrong.advice == "leave"
    assert "does not compute what it should" in wrong.headline


@pytest.mark.parametrize(("gain", "advice"), [(1.3, "keep"), (1.0, "leave")])
def test_the_dense_model_in_the_same_integers_is_a_rival(
    report: Report, gain: float, advice: str
) -> None:
    rival = StoredDense(latency=Latency(speedup=Speedup(decode=gain)))
    weights = Weights(dense="float32", sparse="int8")
    said = told(report, 1.0, 2.0, stored_dense=rival, weights=weights)
    assert said.advice == advice
    words = said.whom[1] if advice == "keep" else said.headline
    assert "the dense model in int8" in words
    unknown = told(report, 1.0, 2.0, stored_dense=StoredDense(), weights=weights)
    assert unknown.advice == "keep"


def test_where_quantisation_gains_it_all_the_answer_says_so(report: Report) -> None:
    rival = StoredDense(
        scores=Scores(perplexity_ratio=1.004), latency=Latency(speedup=Speedup(decode=1.02))
    )
    weights = Weights(dense="float32", sparse="int8")
    said = told(report, 1.05, 2.55, stored_dense=rival, weights=weights)
    assert said.advice == "leave"
    assert "Sparsity does not pay here: on top of int8 it is 1.02x as fast" in said.whom[0]
    assert "It is 2.5x as fast as dense, at 1.004 times its perplexity" in said.whom[0]
    assert "--pattern 16:16 --weights int8" in said.whom[0]


def test_a_budgets_report_says_what_one_pattern_would_have_cost(report: Report) -> None:
    budgeted = told(report, 1.05, 1.5, allocation=sample_allocation())
    line = budgeted.whom[-1]
    assert "1.15 times dense, 38 % of the bytes saved" in line
    assert "8:16 everywhere saves 50 %, at 1.34 times (`--pattern 8:16`)" in line
    assert "everywhere" not in " ".join(told(report, 1.05, 1.5).whom)


def test_slow_prompts_are_said(report: Report) -> None:
    speedup = Speedup(decode=1.5, prefill=0.9)
    accuracy = replace(report.accuracy, perplexity_ratio=1.0)
    latency = replace(report.latency, speedup=speedup)
    said = answer(replace(report, accuracy=accuracy, latency=latency))
    assert "Not for long prompts" in said.whom[1]


def test_facts_are_quality_speed_and_memory_in_words(report: Report) -> None:
    facts = {fact.about: fact for fact in told(report, 1.043, 1.5).facts}
    assert facts["Quality"].figure == "4 % worse"
    assert told(report, 0.93, 1.5).facts[0].figure == "7 % better"
    assert told(report, 1.001, 1.5).facts[0].figure == "the same"
    assert facts["Speed, one user"].figure == "1.5x as fast"
    assert "tokens/s; dense makes" in facts["Speed, one user"].words
    assert "dense was not measured" in facts["Memory"].words
    unknown = answer(replace(report, latency=Latency(why="timing was left out")))
    assert [fact.figure for fact in unknown.facts[1:3]] == ["?", "?"]
    assert "timing was left out" in unknown.facts[1].words


def test_doubts_name_what_was_not_measured_and_the_command_that_does(report: Report) -> None:
    own = replace(report.accuracy, dataset="self", tokens=500, tasks={})
    doubts = " ".join(answer(replace(report, accuracy=own)).doubts)
    for words in ("wrote itself", "500 tokens", "--tasks", "--clients 8", "--weights int8"):
        assert words in doubts
    stored = replace(report, weights=Weights(dense="float32", sparse="int8"))
    assert "--weights int8" not in " ".join(answer(stored).doubts)


def test_both_pages_begin_with_the_answer(report: Report) -> None:
    said = answer(report)
    page = pages.html(report)
    first, _, _ = page.partition("<section")
    for text in (first, pages.markdown(report)[:2000]):
        assert said.headline in text
        assert all(fact.figure in text for fact in said.facts)
    assert "<code>--effort thorough</code>" in first
    # What an engineer needs comes after; tables of all linears are folded.
    assert page.index(said.headline) < page.index('id="gates"') < page.index('id="layers"')
    for table in re.findall(r'<table class="ledger">', page):
        assert page.rindex("<details>", 0, page.index(table)) > page.rindex(
            "<section", 0, page.index(table)
        )
