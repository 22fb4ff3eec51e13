"""The folded model scored in torch: whole, layer by layer, and by several processes."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from nmexport import evaluation
from nmexport.cli.main import cli
from nmexport.errors import ArtifactError, WorkDirectoryError
from nmexport.evaluation import Share, evaluate
from nmexport.models.offload import Memory
from nmexport.progress import Silent
from nmexport.store.records import json_from
from nmexport.store.scratch import scratch_array
from nmexport.store.work_directory import WorkDirectory

if TYPE_CHECKING:
    from pathlib import Path

WINDOWS = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Keep the largest scores of every group, per token.\n" * 60, "utf-8")
    return path


def fold(model: Path, work: Path, text: Path, *more: str) -> WorkDirectory:
    done = CliRunner().invoke(
        cli,
        [
            "build", "--to", "fold", "--model", str(model), "--work", str(work),
            "--calib", str(text), "--calib-samples", "2", "--calib-length", "24",
            "--calib-self-share", "0", "--eval-data", str(text), "--eval-windows", str(WINDOWS),
            "--eval-length", "24", "--criterion", "act", "--mitigation", "var",
            "--grouping", "balanced", *more,
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return WorkDirectory(work)


@pytest.fixture(scope="module")
def work(tiny_llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    return fold(tiny_llama, tmp_path_factory.mktemp("work") / "w", text)


@pytest.fixture(scope="module")
def alone(work: WorkDirectory) -> dict[str, Any]:
    found = evaluate(work, Share(), progress=Silent())
    assert found is not None
    return json_from(found)


def test_it_is_the_dense_and_the_folded_model(alone: dict[str, Any], work: WorkDirectory) -> None:
    import torch
    from nmexport.models.loader import load_tokenizer
    from nmexport.models.source import resolve
    from nmexport.stages.fold import Artifact
    from nmexport.verification.reference import open_folded

    recipe = work.recipe()
    source = resolve(recipe.model)
    with open(recipe.evaluation.corpus, encoding="utf-8") as stream:  # noqa: PTH123
        ids = load_tokenizer(source)(stream.read(), add_special_tokens=False)["input_ids"]
    windows = np.array(ids[: WINDOWS * 24]).reshape(WINDOWS, 24)
    with open_folded(source, recipe.model, Artifact(work.require("fold"))) as session:
        logits = torch.from_numpy(session.prefill(windows)).double()
    targets = torch.from_numpy(windows[:, 1:]).flatten()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    assert alone["sparse"]["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-5)
    assert alone["sparse"]["perplexity"] != pytest.approx(alone["dense"]["perplexity"], rel=1e-4)
    assert alone["tokens"] == WINDOWS * 23
    assert alone["phases"] == "all"


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_several_processes_find_what_one_finds(
    processes: int, alone: dict[str, Any], work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More processes than windows as well: then some have nothing to do."""
    gathered: list[Any] = []

    def collect(scores: list[Any], share: Share) -> list[Any]:
        gathered.extend(scores)
        return gathered if share.is_main else []

    monkeypatch.setattr(evaluation, "_gather", collect)
    for rank in reversed(range(processes)):  # the main process last, as if it had waited
        found = evaluate(work, Share(rank=rank, processes=processes), progress=Silent())
        assert (found is None) == (rank != 0)
    assert {**json_from(found), "processes": 1} == alone


def test_layer_by_layer_gives_the_same_figures(
    alone: dict[str, Any], work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmexport.evaluation.free_memory", lambda: Memory(host=100_000))
    assert json_from(evaluate(work, Share(), progress=Silent())) == alone


@pytest.mark.parametrize(
    ("device", "free", "expected"),
    [("cpu", (), "cpu"), ("cuda:1", (0, 5000), "cuda:1"), ("cuda:1", (5000, 4000), "cpu")],
)
def test_a_gpu_without_room_for_both_models_is_left_alone(
    device: str, free: tuple[int, ...], expected: str
) -> None:
    memory = Memory(host=10_000, devices=free)
    assert evaluation._device(Share(device=device), 1000, memory) == expected


def test_layer_by_layer_scores_a_sparse_head(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = fold(tiny_llama, tmp_path / "w", text, "--targets", "lm_head")
    whole = evaluate(sparse, Share(), progress=Silent())
    assert whole.kl_mean > 1e-3
    monkeypatch.setattr("nmexport.evaluation.free_memory", lambda: Memory(host=100_000))
    assert evaluate(sparse, Share(), progress=Silent()) == whole


def test_answers_wait_in_the_work_directory_and_leave_nothing(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(work.root.iterdir())
    used: list[Path | None] = []

    def full(shape: tuple[int, ...], folder: Path | None) -> Any:
        used.append(folder)
        if len(used) > 2:  # hidden states and the dense model's answers had room
            raise OSError(errno.ENOSPC, "No space left on device")
        return scratch_array(shape, folder)

    monkeypatch.setattr("nmexport.evaluation.free_memory", lambda: Memory(host=100_000))
    for user in ("models.hidden_states", "verification.precomputed"):
        monkeypatch.setattr(f"nmexport.{user}.scratch_array", full)
    with pytest.raises(WorkDirectoryError, match="is full"):
        evaluate(work, Share(), progress=Silent())
    assert used == [work.root] * 3
    assert sorted(work.root.iterdir()) == before


def test_layer_by_layer_the_second_half_of_a_window_is_decoded(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = fold(tiny_llama, tmp_path / "w", text, "--phases", "decode")
    stepwise = evaluate(decoding, Share(), progress=Silent())
    assert stepwise is not None
    monkeypatch.setattr("nmexport.evaluation.free_memory", lambda: Memory(host=100_000))
    layerwise = evaluate(decoding, Share(), progress=Silent())
    assert layerwise is not None
    assert layerwise.phases == stepwise.phases == "decode"
    assert layerwise.perplexity_ratio == pytest.approx(stepwise.perplexity_ratio, rel=1e-4)
    assert layerwise.kl_mean == pytest.approx(stepwise.kl_mean, rel=1e-2)
    assert layerwise.second_half is None


def test_a_precomputed_model_answers_its_windows_only(tiny_llama: Path) -> None:
    from nmexport.models.layerwise import LayerwiseModel
    from nmexport.models.source import resolve
    from nmexport.recipe import ModelSection
    from nmexport.verification.precomputed import Precomputed

    model = LayerwiseModel(resolve(ModelSection(id=str(tiny_llama))))
    windows = np.arange(3, 27).reshape(2, 12)
    with Precomputed(model, windows, progress=Silent(), label="") as session:
        assert session.prefill(windows[1:]).shape == (1, 12, session.vocabulary_size)
        with pytest.raises(RuntimeError, match="no cache"):
            session.decode_step(windows[:1, :1])
    with pytest.raises(KeyError):
        session.prefill(windows[1:])


def test_nothing_folded_is_said(tmp_path: Path, work: WorkDirectory) -> None:
    (tmp_path / "resolved.yaml").write_bytes((work.root / "resolved.yaml").read_bytes())
    with pytest.raises(ArtifactError, match="no finished fold"):
        evaluate(WorkDirectory(tmp_path), Share(), progress=Silent())


def test_the_verb_prints_figures(work: WorkDirectory, alone: dict[str, Any]) -> None:
    done = CliRunner().invoke(cli, ["evaluate", "--work", str(work.root), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accuracy"] == alone
    done = CliRunner().invoke(cli, ["evaluate", "--work", str(work.root)])
    assert f"{alone['perplexity_ratio']:.3f}x" in done.stdout


def test_the_help_shows_the_command_for_several_gpus() -> None:
    told = CliRunner().invoke(cli, ["evaluate", "--help"]).stdout
    assert "\n  accelerate launch -m nmexport evaluate --work DIR\n" in told
    assert "\\b" not in told


def test_the_other_processes_stay_silent(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "read_launch", lambda: Share(rank=1, processes=2))
    monkeypatch.setattr(evaluation, "_gather", lambda scores, share: scores)
    done = CliRunner().invoke(cli, ["evaluate", "--work", str(work.root)])
    assert (done.exit_code, done.stdout) == (0, "")


@pytest.mark.slow
def test_launched_processes_score_in_parallel(work: WorkDirectory, alone: dict[str, Any]) -> None:
    """By the launcher that `accelerate launch` starts for GPUs; on CPUs it starts none itself."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "-m", "nmexport", "evaluate", "--work", str(work.root), "--json",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["accuracy"]
    assert found["processes"] == 2
    # A process with fewer threads may sum in another order.
    for name in ("perplexity_ratio", "kl_mean"):
        assert found[name] == pytest.approx(alone[name], rel=1e-5)
    assert found["tokens"] == alone["tokens"]


@pytest.mark.slow
def test_accelerate_launches_the_verb(work: WorkDirectory, alone: dict[str, Any]) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "-m", "nmexport", "evaluate", "--work", str(work.root), "--json",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["accuracy"]
    assert found["perplexity_ratio"] == pytest.approx(alone["perplexity_ratio"], rel=1e-5)


def test_another_text_is_scored_on_demand(
    work: WorkDirectory, alone: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("A queue of requests, each with a deadline of its own.\n" * 60, "utf-8")
    before = (work.root / "resolved.yaml").read_bytes()
    options = ["--eval-data", str(other), "--eval-windows", "2", "--eval-length", "16"]
    done = CliRunner().invoke(cli, ["evaluate", "--work", str(work.root), "--json", *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["accuracy"]
    assert found["dataset"] == str(other)
    assert found["tokens"] == 2 * 15
    assert found["dense"]["perplexity"] != alone["dense"]["perplexity"]
    assert (work.root / "resolved.yaml").read_bytes() == before


def test_a_text_that_is_not_there_is_said(work: WorkDirectory, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    done = CliRunner().invoke(cli, ["evaluate", "--work", str(work.root), "--eval-data", missing])
    assert done.exit_code == 1
    assert "missing.txt" in done.output
