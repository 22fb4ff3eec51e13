"""A budget from the command line to the report, on a tiny model whose linears end up unlike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.inspect.describe import describe
from nmexport.stages import fold
from nmexport.store.allocation import FILENAME, read_allocation
from nmexport.store.layers import LayerSpec, model_phases, read_layers
from nmexport.store.work_directory import WorkDirectory

if TYPE_CHECKING:
    from pathlib import Path

SECTIONS: dict[str, Any] = {
    "sparsity": {"criterion": "act", "mitigations": ["var"], "grouping": "balanced"},
    "calibration": {"samples": 8, "length": 32},
    "evaluation": {"windows": 2, "length": 32, "prompts": 2, "generate_tokens": 4},
    "latency": {"prefill_tokens": 8, "decode_context": 8, "runs": 3, "warmup": 1, "threads": 1},
    "allocation": {
        "budget": {"max_kl": 0.02},
        "patterns": ["12:16", "8:16", "2:4", "4:16"],
        "criteria": ["act", "wina"],
        "phases": ["all", "decode"],
        "windows": 2,
        "length": 32,
        "front": [0.2, 0.4],
        # Tiny products cost nothing but their bytes, and prompts count: both phases are worth it.
        "cost": {"dense_overhead_us": 0.0, "sparse_overhead_us": 0.0, "prefill_weight": 0.05},
    },
    "target": "onnxruntime",
}


def write_recipe(folder: Path, model: Path, **sections: Any) -> Path:
    path = folder / "recipe.yaml"
    document = {"schema": 1, "model": {"id": str(model)}, **SECTIONS, **sections}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    work = folder / "work"
    recipe = write_recipe(folder, tiny_llama)
    done = run("build", "--recipe", recipe, "--work", work, "--to", "verify")
    assert done.exit_code == 0, done.output
    return work


@pytest.fixture(scope="module")
def report(built: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((built / "report.json").read_text(encoding="utf-8"))
    return found


def layers_of(work: Path) -> list[LayerSpec]:
    return list(read_layers(work / "fold" / "current").layers)


def test_linears_got_patterns_and_phases_of_their_own(built: Path) -> None:
    layers = layers_of(built)
    allocation = read_allocation(built / "fold" / "current")
    assert allocation is not None
    assert {layer.name for layer in layers} == set(allocation.sparse)
    assert len({layer.pattern for layer in layers}) > 1
    assert {layer.phase for layer in layers} == {"all", "decode"}
    assert model_phases(layers) == "mixed"
    for layer in layers:
        choice = allocation.choices[layer.name]
        assert (layer.pattern, layer.criterion, layer.phase) == (
            choice.pattern,
            choice.criterion,
            choice.phase,
        )
    for row in allocation.ledger:
        assert {allocation.choices[name] for name in row.site} == {row.choice}


def test_the_budget_holds_on_what_was_measured(built: Path) -> None:
    allocation = read_allocation(built / "fold" / "current")
    assert allocation is not None
    assert 0 < allocation.kl <= 0.02
    assert allocation.bytes_saved > 0.1
    fronts = [point for point in allocation.front if point.kind == "front"]
    assert [round(point.bytes_saved, 1) for point in fronts] == [0.2, 0.4]
    assert fronts[0].summed_kl < fronts[1].summed_kl
    assert len([point for point in allocation.front if point.kind == "uniform"]) == 16


def test_linears_of_a_site_have_one_input_side(built: Path) -> None:
    artifact = fold.Artifact(built / "fold" / "current")
    by_name = {layer.name: artifact.tensors(layer.name) for layer in artifact.layers}
    allocation = read_allocation(built / "fold" / "current")
    assert allocation is not None
    shared = [row.site for row in allocation.ledger if len(row.site) > 1 and row.choice.pattern]
    assert shared
    for site in shared:
        for kind in ("channel_order", "score_scale"):
            values = [by_name[name].get(kind) for name in site]
            assert all((one is None) == (values[0] is None) for one in values)
            assert all(one is None or one.equal(values[0]) for one in values)


def test_every_executor_computes_unlike_linears(report: dict[str, Any]) -> None:
    for executor in ("torch", "onnx", "engine"):
        figures = report["parity"]["linears"][executor]
        if executor == "engine" and figures["within_contract"] is None:
            continue  # no compiler here: the report says so
        assert figures["within_contract"] is True, executor
        assert figures["linears"] == report["sparsity"]["sparsified"]


def test_a_model_of_unlike_phases_is_scored_on_what_it_decodes(report: dict[str, Any]) -> None:
    assert report["phases"] == "mixed"
    assert "some linears are dense" in report["accuracy"]["protocol"]
    assert report["accuracy"]["tokens"] == 2 * 15
    assert report["accuracy"]["decode_only"] is None
    assert 0 < report["accuracy"]["kl_mean"] < 0.2


def test_the_audit_counts_each_linear_by_its_pattern_and_phase(
    built: Path, report: dict[str, Any]
) -> None:
    layers = {layer.name: layer for layer in layers_of(built)}
    for row in report["sparsity"]["layers"]:
        layer = layers[row["name"]]
        assert row["achieved"] == pytest.approx(layer.pattern.sparsity, abs=0.02)
        tokens = row["total"] / layer.in_features
        assert tokens == (2 * 32 if layer.phase == "all" else 2 * 4)


def test_the_report_shows_it(built: Path, report: dict[str, Any]) -> None:
    assert report["pattern"] == "mixed patterns"
    assert report["allocation"]["budget"] == {"max_kl": 0.02}
    page = (built / "report.html").read_text(encoding="utf-8")
    assert "Pareto front" in page
    assert "KL at most 0.02 nats" in page
    found = describe(built / "fold" / "current")
    assert {row["phase"] for row in found["layers"]} == {"all", "decode"}
    assert FILENAME in {file["path"] for file in found["files"]}


def test_the_command_line_replaces_the_budget(
    built: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)

    def plan(*options: str) -> dict[str, str]:
        done = run("build", "--recipe", recipe, "--work", built, "--dry-run", "--json", *options)
        assert done.exit_code == 0, done.output
        return {step["stage"]: step["action"] for step in json.loads(done.stdout)["stages"]}

    assert plan()["fold"] == "cached"
    assert plan("--budget", "kl=0.02")["fold"] == "cached"
    assert plan("--budget", "bytes=0.7")["fold"] == "run"
    assert plan("--budget", "none")["fold"] == "run"
    assert plan("--budget", "kl=0.02", "--budget", "speedup=1.1")["fold"] == "run"


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (("--budget-pattern", "8:16", "--budget-pattern", "2:4"), False),
        (("--budget-criterion", "act", "--budget-criterion", "wina"), True),
        (("--budget-criterion", "act", "--budget-criterion", "clact"), False),
        (("--budget-phases", "all", "--budget-phases", "decode"), True),
        (("--budget-phases", "decode"), False),
        (("--budget-count-learned",), False),
    ],
)
def test_the_command_line_says_what_a_budget_may_choose(
    built: Path, tiny_llama: Path, tmp_path: Path, options: tuple[str, ...], same: bool
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    done = run("build", "--recipe", recipe, "--work", built, "--dry-run", "--json", *options)
    assert done.exit_code == 0, done.output
    actions = {step["stage"]: step["action"] for step in json.loads(done.stdout)["stages"]}
    assert (actions["fold"] == "cached") == same


def test_candidates_without_a_budget_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    done = run("build", "--recipe", recipe, "--budget", "none", "--budget-pattern", "2:4")
    assert done.exit_code == 1
    assert "--budget-pattern says what a budget may choose, and there is none" in done.output
    done = run("build", "--recipe", recipe, "--budget-pattern", "3-4", "--dry-run")
    assert done.exit_code == 1
    assert "'3-4' is not an N:M pattern" in done.output


def test_what_cannot_be_is_refused_before_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    for wrong, words in (("bytes", "NAME=NUMBER"), ("size=3", "ppl, kl, speedup, bytes")):
        done = run("build", "--recipe", recipe, "--budget", wrong, "--dry-run")
        assert done.exit_code == 2
        assert words in done.output
    done = run("build", "--recipe", recipe, "--budget", "ppl=0.9", "--dry-run")
    assert done.exit_code == 1
    assert "--budget cannot be 0.9" in done.output
    folded = {**SECTIONS["sparsity"], "mitigations": ["gain"]}
    recipe = write_recipe(tmp_path, tiny_llama, sparsity=folded)
    done = run("build", "--recipe", recipe, "--work", tmp_path / "w", "--dry-run")
    assert done.exit_code == 1
    assert "gain cannot be used with phases decode" in done.output
    assert not WorkDirectory(tmp_path / "w").root.exists()


def test_a_budget_out_of_reach_says_what_is_in_reach(
    built: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    arguments = ("--recipe", recipe, "--work", built, "--from", "fold", "--to", "fold")
    done = run("build", *arguments, "--budget", "bytes=0.1")
    assert done.exit_code == 1
    assert "bytes of at least 0.25" in done.output
    assert read_allocation(built / "fold" / "current") is not None
