"""What is wrong with a model, a text or a recipe is said before the first stage runs.

`--dry-run` says the same: it asks every stage that is going to run, and writes nothing.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.stages import calibrate
from safetensors.torch import load_file, save_file

from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SIZES = (
    *("--pattern", "16:16", "--criterion", "act", "--mitigation", "none"),
    *("--grouping", "consecutive", "--calib-samples", "4", "--calib-length", "16"),
    *("--eval-windows", "2", "--eval-length", "64"),
)


def build(model: Path, work: Path, *options: str | Path) -> Result:
    words = ["build", "--model", model, "--work", work, *SIZES, *options]
    return CliRunner().invoke(cli, list(map(str, words)))


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("calibrate ran")

    monkeypatch.setattr(calibrate, "run", refuse)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--eval-data", "e.txt", "A few words."), "2 are needed (128 tokens)"),
        (("--eval-data", "e.jsonl", '{"text": "a"}\n{"txt": "b"}'), "e.jsonl:2 has neither text"),
        (("--calib", "c.jsonl", '{"text": '), "c.jsonl:1 is not JSON"),
        (("--calib", "c.txt", "A few words."), "whole windows of 16 tokens"),
    ],
)
def test_a_text(
    dry: bool, given: tuple[str, str, str], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    option, name, text = given
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    work = tmp_path / "work"
    told = build(tiny_llama, work, option, path, *(["--dry-run"] if dry else []))
    assert told.exit_code == 1
    assert says in told.output
    assert not dry or not work.exists()


def test_a_weight_that_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = build(folder, tmp_path / "work", "--dry-run")
    assert told.exit_code == 1
    assert "hold no model.layers.1.mlp.up_proj.weight" in told.output


def test_a_kind_that_export_cannot_take(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "qwen3_moe")
    told = build(tmp_path / "model", tmp_path / "work", "--dry-run")
    assert told.exit_code == 1
    assert "is a mixture of experts" in told.output


def test_a_sound_model(tiny_llama: Path, tmp_path: Path) -> None:
    told = build(tiny_llama, tmp_path / "work", "--dry-run", "--json")
    assert told.exit_code == 0, told.output
    assert {step["action"] for step in json.loads(told.stdout)["stages"]} == {"run"}
    assert not (tmp_path / "work").exists()
