"""A budget over forms of weights and patterns, from the command line to the report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from nmexport.stages import fold
from nmexport.store.allocation import read_allocation

from tests.allocation.test_end_to_end import SECTIONS, run, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

ALLOCATION = {
    **SECTIONS["allocation"],
    "budget": {"max_bytes": 0.6},
    "patterns": ["12:16", "8:16"],
    "criteria": [],
    "phases": [],
    "front": [0.3],
}
FORMS = ("--budget-weights", "int4", "--budget-weights", "int8")


def build(folder: Path, model: Path, *options: str, **allocation: Any) -> Path:
    recipe = write_recipe(folder, model, allocation={**ALLOCATION, **allocation})
    work = folder / "work"
    done = run("build", "--recipe", recipe, "--work", work, "--to", "verify", *options)
    assert done.exit_code == 0, done.output
    return work


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("forms"), tiny_llama, *FORMS)


@pytest.fixture(scope="module")
def report(built: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((built / "report.json").read_text(encoding="utf-8"))
    return found


def test_each_linear_is_stored_as_was_chosen(built: Path) -> None:
    artifact = fold.Artifact(built / "fold" / "current")
    allocation = read_allocation(built / "fold" / "current")
    assert allocation is not None
    chosen = {name: choice.weights for name, choice in allocation.choices.items()}
    assert len(set(chosen.values())) > 1
    layers = {layer.name: layer for layer in artifact.linears}
    for name, form in chosen.items():
        assert layers[name].weight_type == form
    assert layers["lm_head"].weight_type == "int8"
    assert artifact.embedding_bits == 8
    assert {layer.name for layer in artifact.layers} == set(allocation.sparse)
    assert allocation.built is not None
    assert allocation.built.kl == pytest.approx(allocation.kl, rel=0.3)


def test_every_executor_computes_mixed_forms(report: dict[str, Any]) -> None:
    for executor in ("torch", "onnx", "engine"):
        figures = report["parity"]["linears"][executor]
        if executor == "engine" and figures["within_contract"] is None:
            continue  # no compiler here: the report says so
        assert figures["within_contract"] is True, executor


def test_the_report_counts_the_forms(built: Path, report: dict[str, Any]) -> None:
    allocation = read_allocation(built / "fold" / "current")
    assert allocation is not None
    forms = list(allocation.forms.values())
    page = (built / "report.md").read_text(encoding="utf-8")
    for form in set(forms):
        assert f"{forms.count(form)} in {form}" in page
    assert report["weights"]["sparse"] == "int8 and int4"
    html = (built / "report.html").read_text(encoding="utf-8")
    assert "quantisation alone" in html
    assert "sparsity alone" in html


def test_where_sparsity_does_not_pay_all_of_it_is_dense_and_said_so(
    tiny_llama: Path, tmp_path: Path
) -> None:
    forms = ("--budget-weights", "float", *FORMS)
    work = build(tmp_path, tiny_llama, *forms, budget={"max_bytes": 0.3})
    artifact = fold.Artifact(work / "fold" / "current")
    allocation = read_allocation(work / "fold" / "current")
    assert allocation is not None
    assert allocation.built is not None
    assert allocation.built.kl == pytest.approx(allocation.kl, rel=0.01)
    assert {str(layer.pattern) for layer in artifact.layers} == {"16:16"}
    assert "Sparsity does not pay under this budget" in (work / "report.md").read_text("utf-8")


def test_wrong_forms_are_refused_in_a_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, allocation=ALLOCATION)
    for wrong in ("auto", "int5", "int8:17"):
        done = run("build", "--recipe", recipe, "--budget-weights", wrong, "--dry-run")
        assert done.exit_code == 1
        assert f'--budget-weights cannot be "{wrong}"' in done.output
    done = run("build", "--recipe", recipe, "--budget-weights", "int8:48", "--dry-run")
    assert done.exit_code == 1
    assert "Weights in int8:48 do not fit" in done.output
    done = run("build", "--recipe", recipe, "--budget", "none", "--budget-weights", "int8")
    assert done.exit_code == 1
    assert "--budget-weights says what a budget may choose, and there is none" in done.output
