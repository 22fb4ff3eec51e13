"""Sweeps: what a file asks for, baselines, what is shared, what is resumed, where it runs."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import types
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.errors import EnvironmentFault, RecipeError, WorkDirectoryError
from nmexport.progress import Silent
from nmexport.recipe import resolve
from nmexport.report.model import json_of
from nmexport.runtimes.session import Session
from nmexport.sparsity.pattern import NMPattern
from nmexport.sweep import measure, outcome, plan
from nmexport.sweep.baselines import TopKLinear, kept_count, largest, pruned_weight, replacement
from nmexport.sweep.cluster import RayCluster, ThisMachine, reservation
from nmexport.sweep.plan import Baseline
from nmexport.sweep.replay import Replay
from nmexport.sweep.row import Figures, Perplexities, Row
from torch import nn

from tests.support.tiny_gguf import save_tiny_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = "The quick brown fox jumps over the lazy dog. A model reads weights, per token.\n"

FILE = """
schema: 1
models: [{model}]
recipe:
  calibration: {{corpus: {text}, samples: 2, length: 16}}
  evaluation: {{corpus: {text}, windows: 3, length: 16}}
  sparsity: {{criterion: act, mitigations: [], grouping: consecutive}}
grid:
  sparsity.pattern: ["2:4", "8:16"]
cells:
  - {{sparsity.pattern: "8:16"}}          # once more: measured once
  - {{sparsity.pattern: "4:8", seed: 3}}
  - {{sparsity.mitigations: [d-pts, s-pts]}}
baselines: [activations 50%, weights 8:16]
"""


@pytest.fixture(scope="module")
def sweep_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(FILE.format(model=tiny_llama, text=folder / "text.txt"), encoding="utf-8")
    return path


def run(*arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["sweep", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def swept(sweep_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("swept") / "out"
    return root, run(sweep_file, "--work", root)


def test_a_gguf_is_dequantised_once_for_all_cells(tiny_llama: Path, tmp_path: Path) -> None:
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf")
    section = resolve(str(tmp_path / "m.gguf")).model
    job = plan.Job(model="m", folder=tmp_path / "m", cells=(), measure="accuracy")
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    sources = [measure._Bench(job, progress)._readable_model(section) for _ in range(2)]
    assert len(notes) == 1
    assert "once for all" in notes[0]
    assert sources[0] == sources[1]
    assert sources[0].unpacked is not None


# -- what is measured --------------------------------------------------------------------------


def test_every_cell_has_a_row_in_the_files_order(swept: tuple[Path, Any]) -> None:
    rows = swept[1]["rows"]
    assert [(row["pattern"], row["baseline"], "refused" in row) for row in rows] == [
        ("2:4", None, False),
        ("8:16", None, False),
        ("4:8", None, False),
        (rows[3]["pattern"], None, True),
        (None, "activations 50%", False),
        (None, "weights 8:16", False),
    ]
    assert "combined" in rows[3]["refused"]
    assert "seed 3" in rows[2]["label"]
    dense = {row["perplexity"]["dense"] for row in rows if "perplexity" in row}
    assert len(dense) == 1
    for row in rows:
        if "refused" not in row:
            ratio = row["perplexity"]["sparse"] / row["perplexity"]["dense"]
            assert row["perplexity_ratio"] == pytest.approx(ratio, rel=1e-9)
            assert row["tokens"] == 3 * 15
            assert row["kl_mean"] > 0


def test_calibration_runs_once_and_folded_weights_go(swept: tuple[Path, Any]) -> None:
    work = next(swept[0].glob("*/work"))
    built = [path for path in (work / "calibrate").iterdir() if not path.is_symlink()]
    assert len(built) == 2  # one seed and the other
    assert list((work / "fold").iterdir()) == []


def test_a_cell_is_what_verification_would_say(swept: tuple[Path, Any], sweep_file: Path) -> None:
    """Scored once more here, from the model's folded linears, by hand."""
    from nmexport.models.loader import load_model
    from nmexport.models.source import resolve
    from nmexport.models.swap import replace_linears
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.targets import linears_of
    from nmexport.store.tensors import load_tensors

    from tests.support.unfolded import folded_linear

    recipe = plan.load(sweep_file).cells
    source = resolve(next(iter(recipe.values()))[0].recipe.model)
    windows = load_tensors(next(swept[0].glob("*/windows-*.safetensors")))["input_ids"].long()
    model = load_model(source)
    folded = {
        name: folded_linear(linear, Behaviour(pattern=NMPattern(8, 16)), Constants())
        for name, linear in linears_of(model).items()
        if name != "lm_head"
    }
    replace_linears(model, folded)
    with torch.inference_mode():
        logits = model(input_ids=windows).logits.double()
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    row = next(row for row in swept[1]["rows"] if row["pattern"] == "8:16")
    assert row["perplexity"]["sparse"] == pytest.approx(float(nll.exp()), rel=1e-5)


def test_a_second_run_measures_nothing(
    swept: tuple[Path, Any], sweep_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure._Bench, "_figures", never)
    assert run(sweep_file, "--work", swept[0])["rows"] == swept[1]["rows"]


def test_a_killed_sweep_goes_on_where_it_stopped(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = measure._Bench._figures
    seen: list[str] = []

    def until_the_third(bench: Any, cell: plan.Cell) -> dict[str, Any]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(cell.label)
        return figures(bench, cell)

    monkeypatch.setattr(measure._Bench, "_figures", until_the_third)
    arguments = ["sweep", str(sweep_file), "--work", str(tmp_path / "out")]
    assert CliRunner().invoke(cli, arguments).exit_code == 130
    monkeypatch.setattr(
        measure._Bench, "_figures", lambda bench, cell: seen.append("") or figures(bench, cell)
    )
    rows = run(sweep_file, "--work", tmp_path / "out")["rows"]
    assert len(seen) == 2 + 3
    assert len(rows) == 6


def test_another_text_is_another_measurement(
    swept: tuple[Path, Any], sweep_file: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(swept[0], tmp_path / "out", symlinks=True)
    other = tmp_path / "other.txt"
    other.write_text("Keep the largest scores of every group, per token.\n" * 40, "utf-8")
    rows = run(
        sweep_file, "--work", root, "--set", f"evaluation.corpus={other}",
        "--set", "evaluation.windows=2",
    )["rows"]  # fmt: skip
    assert rows[0]["tokens"] == 2 * 15
    assert rows[0]["perplexity"]["dense"] != swept[1]["rows"][0]["perplexity"]["dense"]


def test_a_whole_build_adds_speed(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages themselves have tests; here is what a sweep takes from their report."""
    from tests.support.sample_report import sample_report

    path = tmp_path / "build.yaml"
    path.write_text(sweep_file.read_text("utf-8").replace("baselines:", "#") + "measure: build\n")
    report = sample_report(tmp_path, layers=2)

    def build(pipeline: Any, selection: Any) -> None:
        assert selection.last == "verify"
        folder = pipeline.work.folder("verify", "0" * 64)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "manifest.json"):
            (folder / name).write_text(json.dumps(json_of(report)), "utf-8")
        pipeline.work.use("verify", "0" * 64)

    monkeypatch.setattr("nmexport.pipeline.Pipeline.run", build)
    found = run(path, "--work", tmp_path / "out")
    speed = report.latency.speedup.decode
    assert found["rows"][0]["speedup"]["decode"] == speed
    text = (tmp_path / "out" / "sweep.md").read_text("utf-8")
    assert f"{speed:.2f}x" in text


# -- what is written ---------------------------------------------------------------------------


def test_table_and_plot_show_every_cell(swept: tuple[Path, Any]) -> None:
    root, found = swept
    text = (root / "sweep.md").read_text("utf-8")
    assert json.loads((root / "sweep.json").read_text("utf-8")) == found
    assert len(re.findall(r"^\| (?!what)", text, re.MULTILINE)) == 6
    picture = re.search(r"!\[.*?\]\((.*?)\)", text)
    assert picture
    svg = ET.parse(root / picture[1]).getroot()  # noqa: S314 - written just now
    words = " ".join(svg.itertext())
    for word in ("8:16", "2:4", "act, none, consecutive", "activations 50%", "weights 8:16"):
        assert word in words


def test_a_person_gets_a_table(swept: tuple[Path, Any], sweep_file: Path) -> None:
    done = CliRunner().invoke(cli, ["sweep", str(sweep_file), "--work", str(swept[0])])
    assert done.exit_code == 0
    assert "weights 8:16" in done.stdout
    assert "refused" in done.stdout


def test_nothing_measured_is_no_plot() -> None:
    assert outcome.plot([Row(model="m", label="x", settings={}, refused="no")], "m") is None


def row_of(label: str, pattern: str | None, ratio: float) -> Row:
    return Row(
        model="m",
        label=label,
        baseline=None if pattern else label,
        pattern=None if pattern is None else NMPattern.parse(pattern),
        settings={},
        figures=Figures(
            perplexity=Perplexities(dense=10.0, sparse=10.0 * ratio),
            tokens=100,
            perplexity_ratio=ratio,
            perplexity_ratio_stderr=0.01,
            kl_mean=0.1,
            top1_agreement=0.9,
        ),
    )


def test_a_plot_ranks_combinations_at_their_common_pattern() -> None:
    rows = [
        row_of("first", "8:16", 1.3),
        row_of("second", "8:16", 1.5),
        row_of("second", "16:32", 1.1),
        row_of("third", "8:16", 1.6),
        row_of("weights 50%", None, 1.2),
    ]
    points = outcome._measured_points(rows, baselines=False)
    assert outcome._rank(points) == ["first", "second", "third"]
    words = list(ET.fromstring(outcome.plot(rows, "m")).itertext())  # noqa: S314 - ours
    places = [words.index(label) for label in ("first", "second", "third", "weights 50%")]
    assert places == sorted(places)


def test_a_baseline_far_off_is_told_and_presses_nothing_together() -> None:
    near = [row_of("one", "8:16", 1.3), row_of("weights 50%", None, 1.2)]
    far = [*near, row_of("weights 2:4", None, 987.0)]
    pictures = [ET.fromstring(outcome.plot(rows, "m")) for rows in (near, far)]  # noqa: S314
    assert "987 \N{RIGHTWARDS ARROW}" in "".join(pictures[1].itertext())
    ticks = [{"1", "1.2"} <= set(picture.itertext()) for picture in pictures]
    assert ticks == [True, True]
    assert "1000" not in set(pictures[1].itertext())


def test_a_dry_run_lists_the_cells(sweep_file: Path, tmp_path: Path) -> None:
    arguments = ["sweep", str(sweep_file), "--work", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0
    assert "6 cells" in done.stdout
    assert len(run(sweep_file, "--dry-run")["cells"]) == 6
    assert not (tmp_path / "out").exists()


# -- what a file may say -----------------------------------------------------------------------


def test_the_sweeps_that_travel_with_the_package_are_whole() -> None:
    for path in plan.find("paper").parent.glob("*.yaml"):
        planned = plan.load(path)
        assert all(cell.refused is None for cells in planned.cells.values() for cell in cells)
    cells = plan.load(plan.find("paper")).cells["smollm2"]
    said = {str(cell.baseline) for cell in cells}
    assert {"activations 50%", "weights 50%", "weights 8:16", "weights 2:4"} <= said
    corrected = {cell.recipe.sparsity.mitigations for cell in cells}
    every = [("d-pts",), ("s-pts",), ("l-pts",), ("var",), ("ls",), ("r-sparse",)]
    assert corrected.issuperset(every)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema: 1", "schema: 2"), "no sweep"),
        (("grid:", "gird:"), "gird is not a key"),
        (("models: [", "models: # ["), "names no models"),
        (('["2:4", "8:16"]', "8:16"), "grid cannot be"),
        (("cells:", "cells: 3 #"), "cells|cannot be read|not"),
        (("weights 8:16", "weights half"), "no baseline 'weights half'"),
        (("weights 8:16", "activations 8:16"), "no baseline|is no baseline"),
        (("activations 50%", "activations 100%"), "100% zeros"),
        (("recipe:", "measure: speed\nrecipe:"), "measure cannot be"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(
    change: tuple[str, str], message: str, sweep_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(sweep_file.read_text("utf-8").replace(*change), "utf-8")
    with pytest.raises(RecipeError, match=message):
        plan.load(path)


def test_a_sweep_of_nothing_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("schema: 1\nmodels: [smollm2]\n", "utf-8")
    with pytest.raises(RecipeError, match="asks for nothing"):
        plan.load(tmp_path / "empty.yaml")
    with pytest.raises(RecipeError, match="no sweep 'papier'") as caught:
        plan.find("papier")
    assert "paper" in str(caught.value.allowed)


def test_one_wrong_key_in_the_only_cell_ends_the_sweep(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("schema: 1\nmodels: [smollm2]\ncells: [{sparsity.patern: 1}]\n", "utf-8")
    with pytest.raises(RecipeError, match="patern"):
        plan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("criterion: act", "criterion: wima"), "wima"),
        (('["2:4", "8:16"]', '["2:4", "17:16"]'), "17:16"),
        (("grid:", "grid:\n  sparsity.criterion: [act, wima]"), "wima"),
        (('["2:4", "8:16"]', '["2:4", "4:7"]'), "Pattern 4:7 does not fit"),
        (("weights 8:16", "weights 4:7"), "Pattern 4:7 does not fit"),
        (("grid:", "grid:\n  model.weights: [int8:48]"), "int8:48"),
        (("grid:", "grid:\n  sparsity.targets.include: [[nothing]]"), "matches no linear"),
    ],
)
def test_cells_that_cannot_be_measured_end_the_sweep_before_it_runs(
    change: tuple[str, str], message: str, sweep_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(sweep_file.read_text("utf-8").replace(*change), "utf-8")
    done = CliRunner().invoke(cli, ["sweep", str(path), "--work", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    assert message in done.stderr
    assert not list((tmp_path / "out").glob("*/cells"))


def test_sweep_that_measures_nothing_is_a_failure(sweep_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    head = sweep_file.read_text("utf-8").partition("grid:")[0]
    path.write_text(head + "cells: [{sparsity.mitigations: [d-pts, s-pts]}]\n", "utf-8")
    done = CliRunner().invoke(cli, ["sweep", str(path), "--work", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "Nothing was measured" in done.stderr


def test_help_shows_a_file_that_loads(tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli, ["sweep", "--help"]).stdout
    lines = shown.partition("A file, in YAML:\n")[2].partition("\nOptions:")[0]
    (tmp_path / "s.yaml").write_text(textwrap.dedent(lines), "utf-8")
    assert len(plan.load(tmp_path / "s.yaml").cells["smollm2"]) == 8


def test_settings_are_yaml_and_wrong_ones_are_said(sweep_file: Path) -> None:
    cells = run(sweep_file, "--dry-run", "--set", "sparsity.criterion=wina")["cells"]
    assert cells[0]["cell"].startswith("wina")
    done = CliRunner().invoke(cli, ["sweep", str(sweep_file), "--set", "seed"])
    assert done.exit_code == 1
    assert "KEY=VALUE" in done.output


def test_models_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    cells: dict[str, tuple[plan.Cell, ...]] = {"a/m": (), "b/m": (), "c/other": ()}
    sweep = plan.Sweep(name="s", measure="accuracy", cells=cells)
    assert sorted(plan.folders(sweep).values()) == ["m", "m-1", "other"]


# -- baselines ---------------------------------------------------------------------------------


def test_weight_pruning_keeps_the_largest_of_each_group() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 5.0, 5.0, 5.0, -5.0]])
    pruned = pruned_weight(weight, NMPattern(2, 4), None)
    assert pruned.tolist() == [[0.0, -4.0, 3.0, 0.0, 5.0, 5.0, 0.0, 0.0]]
    whole = pruned_weight(weight, None, 0.5)
    assert whole.tolist() == [[0.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, -5.0]]


@pytest.mark.parametrize("baseline", ["weights 2:4", "weights 30%", "activations 30%"])
def test_a_baseline_keeps_bias_type_and_share(baseline: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).requires_grad_(False)
    module = replacement(linear, Baseline.parse(baseline))
    x = torch.randn(3, 5, 64)
    assert module(x).shape == (3, 5, 32)
    assert torch.equal(module(torch.zeros(1, 64)), linear.bias[None])
    if isinstance(module, nn.Linear):
        share = float((module.weight == 0).float().mean())
        assert share == pytest.approx(0.5 if "2:4" in baseline else 0.3, abs=0.01)
        assert torch.equal(linear.weight[module.weight != 0], module.weight[module.weight != 0])


def test_unstructured_activations_drop_the_smallest_of_each_token() -> None:
    linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.eye(8))
    x = torch.tensor([[1.0, -8.0, 2.0, 7.0, 0.0, 3.0, -3.0, 3.0], [0.0] * 8])
    assert TopKLinear(linear, 0.5)(x).tolist() == [
        [0.0, -8.0, 0.0, 7.0, 0.0, 3.0, -3.0, 0.0],
        [0.0] * 8,
    ]
    assert torch.equal(TopKLinear(linear, 1e-9)(x), x)
    assert kept_count(7, 0.999) == 1


def test_equal_scores_keep_the_earlier() -> None:
    assert largest(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]


# -- replayed answers --------------------------------------------------------------------------


class Counting(Session):
    vocabulary_size = 5

    def __init__(self) -> None:
        self.calls = 0
        self.read: list[list[int]] = []

    def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
        self.calls += 1
        self.read.append([*(cache or []), *input_ids[0].tolist()])
        return np.repeat(input_ids[..., None], 5, axis=-1).astype(np.float32), self.read[-1]

    def close(self) -> None:
        self.calls += 100


def test_answers_are_computed_once_and_survive_the_model(tmp_path: Path) -> None:
    model = Counting()
    prompts = np.arange(12).reshape(3, 1, 4)
    replay = Replay(lambda: model, 2, tmp_path)
    assert replay.vocabulary_size == 5
    with replay:
        first = [replay.prefill(prompt) for prompt in prompts]
    assert model.calls == 103
    again = [replay.prefill(prompt) for prompt in prompts]
    assert model.calls == 104  # the third prompt had no room
    for before, after in zip(first, again, strict=True):
        assert np.array_equal(before, after)
    assert replay.decode_step(prompts[0]).shape == (1, 4, 5)
    assert model.read[-1] == [8, 9, 10, 11, 0, 1, 2, 3]
    replay.prefill(prompts[0])  # looked up: what goes on from it reads it first
    replay.decode_step(prompts[2][:, :1])
    assert model.read[-2:] == [[0, 1, 2, 3], [0, 1, 2, 3, 8]]
    replay.forget()
    replay.prefill(prompts[0])
    assert list(tmp_path.iterdir()) == []  # the file has no name from the start


def test_answers_too_large_to_keep_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmexport.sweep.replay._KEPT_BYTES", 10)
    model = Counting()
    replay = Replay(lambda: model, 2, tmp_path)
    for _ in range(2):
        replay.prefill(np.zeros((1, 4), np.int64))
    assert model.calls == 2


# -- where it runs -----------------------------------------------------------------------------


def _jobs(sweep_file: Path, root: Path) -> list[plan.Job]:
    cells = {"a": (), "b": (), "c": ()}
    return [
        plan.Job(model=name, folder=root / name, cells=own, measure="accuracy")
        for name, own in cells.items()
    ]


class FakeRay(types.ModuleType):
    """Ray's few functions that we call, tasks ending in reverse order."""

    def __init__(self, fault: Exception | None = None, nodes: Any = ({"CPU": 4.0},)) -> None:
        super().__init__("ray")
        self.log: list[str] = []
        self.fault = fault
        self.resources = nodes
        self.reserved: dict[str, object] = {}

    def nodes(self) -> list[dict[str, Any]]:
        dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
        return [dead, *({"Alive": True, "Resources": one} for one in self.resources)]

    def init(self, *, address: str, **_: object) -> None:
        if self.fault:
            raise self.fault
        self.log.append(address)

    def remote(self, **options: object) -> Callable[..., Any]:
        self.reserved = options
        return lambda function: types.SimpleNamespace(remote=lambda job: (function, job))

    def wait(self, refs: list[Any], *, num_returns: int) -> tuple[list[Any], list[Any]]:
        return refs[-num_returns:], refs[:-num_returns]

    def get(self, ref: Any) -> Any:
        function, job = ref
        try:
            return function(job)
        except Exception as error:
            raised = RuntimeError("a task failed")
            raised.cause = error
            raise raised from error

    def shutdown(self) -> None:
        self.log.append("shutdown")


def test_a_cluster_yields_what_this_machine_yields(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake_run(job: plan.Job, progress: Any) -> list[dict[str, Any]]:
        del progress
        return [{"model": job.model}]

    monkeypatch.setattr(measure, "run", fake_run)
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    jobs = _jobs(sweep_file, tmp_path)
    here = list(ThisMachine(Silent()).run(jobs))
    there = list(RayCluster("somewhere:1").run(jobs))
    assert [job.model for job, _ in there] == ["c", "b", "a"]
    assert sorted(there, key=lambda pair: pair[0].model) == here
    assert ray.log == ["somewhere:1", "shutdown"]
    assert ray.reserved == {"max_retries": 1, "num_cpus": 4, "num_gpus": 0.0}


@pytest.mark.parametrize(
    ("nodes", "said", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 8.0}], {}, (8, 0)),  # a node a task
        ([{"CPU": 2.0}, {"CPU": 64.0}], {}, (64, 0)),  # a head node is left alone
        ([{"CPU": 32.0, "GPU": 4.0}], {}, (8, 1)),
        ([{"CPU": 96.0}, {"CPU": 32.0, "GPU": 2.0}], {}, (16, 1)),
        ([{"CPU": 32.0, "GPU": 1.0}], {"gpus": 0.25}, (8, 0.25)),
        ([{"CPU": 32.0, "GPU": 1.0}], {"gpus": 0}, (32, 0)),
        ([{"CPU": 32.0}], {"cpus": 4}, (4, 0)),
        ([{"CPU": 2.0, "GPU": 8.0}], {}, (1, 1)),
    ],
)
def test_a_task_reserves_a_gpu_and_its_part_of_a_node(
    nodes: Any, said: dict[str, Any], expected: tuple[int, float]
) -> None:
    found = reservation(nodes, **said)
    assert (found["num_cpus"], found["num_gpus"]) == expected


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([{"CPU": 8.0}], {"cpus": 9}),
        ([{"CPU": 8.0}], {"gpus": 1}),
        ([{"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}], {"cpus": 4, "gpus": 1}),
        ([], {}),
    ],
)
def test_what_no_node_has_is_refused(nodes: Any, said: dict[str, Any]) -> None:
    with pytest.raises(EnvironmentFault, match="No node of the cluster"):
        reservation(nodes, **said)


def test_options_of_a_cluster_reach_it(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = FakeRay(nodes=({"CPU": 8.0, "GPU": 2.0},))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(measure, "run", lambda job, progress: [])
    arguments = ["--ray", "auto", "--ray-cpus", "3", "--ray-gpus", "0.5"]
    assert run(sweep_file, "--work", tmp_path / "out", *arguments)["rows"] == []
    assert (ray.reserved["num_cpus"], ray.reserved["num_gpus"]) == (3, 0.5)
    done = CliRunner().invoke(cli, ["sweep", str(sweep_file), "--ray-gpus", "1"])
    assert done.exit_code == 2
    assert "need --ray" in done.output


def test_what_ends_a_task_ends_the_sweep_with_its_message(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(*_: object) -> None:
        raise WorkDirectoryError("held by another sweep")

    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    monkeypatch.setattr(measure, "run", held)
    with pytest.raises(WorkDirectoryError, match="held by another"):
        list(RayCluster("auto").run(_jobs(sweep_file, tmp_path)))


def test_no_ray_and_no_cluster_are_the_environments_fault(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _jobs(sweep_file, tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentFault, match="not installed"):
        list(RayCluster("auto").run(jobs))
    monkeypatch.setitem(sys.modules, "ray", FakeRay(ConnectionError("nobody there")))
    with pytest.raises(EnvironmentFault, match="nobody there"):
        list(RayCluster("auto").run(jobs))


def test_two_sweeps_do_not_share_a_folder(sweep_file: Path, tmp_path: Path) -> None:
    job = _jobs(sweep_file, tmp_path)[0]
    with measure._lock(job.folder), pytest.raises(WorkDirectoryError, match="another sweep"):
        measure.run(job, Silent())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray leaves files open
def test_a_real_ray_measures_the_same(
    sweep_file: Path, tmp_path: Path, swept: tuple[Path, Any]
) -> None:
    pytest.importorskip("ray", reason="the optional package of `nmexport[ray]`")
    found = run(sweep_file, "--work", tmp_path / "out", "--ray", "local")
    timeless = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        for rows in (found["rows"], swept[1]["rows"])
    ]
    assert timeless[0] == timeless[1]
