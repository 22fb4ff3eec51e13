"""`bench rivals` as a whole, without a GPU: figures, the file, the report, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from nmexport.bench.rivals import bench
from nmexport.bench.rivals.bench import RivalOptions, bench_rivals
from nmexport.cli.main import cli
from nmexport.errors import EnvironmentFault, RecipeError
from nmexport.progress import Silent
from nmexport.report import pages, rivals_file
from nmexport.report.model import Rivals
from nmexport.store.work_directory import WorkDirectory

from tests.support.sample_report import sample_report
from tests.support.served import engine_document

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = RivalOptions(context=24, batches=(1, 2), prompts=(9,), runs=3, warmup=1)
NAMES = ("ours, dense", "ours, sparse", "torch.compile, bfloat16", "torch.compile, int8 weights")


@pytest.fixture
def work(tiny_export: Path, tmp_path: Path) -> WorkDirectory:
    """A work directory with an engine and a report."""
    (tmp_path / "resolved.yaml").write_text("model:\n  id: tiny\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "current").symlink_to(tiny_export, target_is_directory=True)
    engine = tmp_path / "engine" / "abc"
    engine.mkdir(parents=True)
    (engine.parent / "current").symlink_to("abc", target_is_directory=True)
    (engine / "engine.json").write_text(json.dumps(engine_document()))
    (engine / "manifest.json").write_text("{}")
    pages.write(sample_report(tiny_export), tmp_path)
    return WorkDirectory(tmp_path)


def test_both_sides_and_rivals_are_measured_saved_and_shown(work: WorkDirectory) -> None:
    cases: list[int] = []

    def save(rivals: Rivals) -> None:
        cases.append(len(rivals.times))
        rivals_file.save(rivals, work)

    outcome = bench_rivals(
        work.require("engine"), OPTIONS, save=save, progress=Silent(), device="cpu"
    )
    assert cases == [4, 8, 11], "each case is saved once it is through"
    assert [(row.name, row.batch) for row in outcome.times[:8]] == [
        (name, batch) for batch in (1, 2) for name in NAMES
    ]
    assert [(row.name, row.phase, row.tokens) for row in outcome.times[8:]] == [
        (name, "prefill", 9) for name in NAMES[:3]
    ]
    for row in outcome.times:
        assert row.why is None
        assert row.p50_ms is not None
        assert row.p90_ms is not None
        assert 0 < row.p50_ms <= row.p90_ms
        assert row.over_rival is not None
        assert row.runs == 3
    dense = [row.over_rival for row in outcome.times if row.name == NAMES[2]]
    assert dense == [1.0, 1.0, 1.0]
    assert rivals_file.read(work) == outcome

    assert rivals_file.show(work)
    for name in ("report.md", "report.html"):
        page = (work.root / name).read_text()
        assert "Rivals on the same GPU" in page
        assert all(text in page for text in (*NAMES, "decode, batch 2, context 24"))
    assert json.loads((work.root / "report.json").read_text())["rivals"]["engine"] == "abc"


def test_another_engines_rivals_are_not_shown(work: WorkDirectory) -> None:
    before = (work.root / "report.json").read_bytes()
    assert not rivals_file.show(work), "nothing was measured"
    other = Rivals(engine="xyz", device="a GPU", runtime="x", runs=3, together=True)
    rivals_file.save(other, work)
    assert not rivals_file.show(work)
    assert (work.root / "report.json").read_bytes() == before
    assert "Rivals" not in (work.root / "report.html").read_text()


def test_without_a_gpu_there_is_one_error(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["bench", "rivals", "--work", str(work.root), "--context", "24"]
    asked = CliRunner().invoke(cli, [*words, "--prompt-tokens", "9"])
    assert asked.exit_code == 1
    assert "sees no GPU here" in asked.stderr
    assert "Traceback" not in asked.stderr
    assert not (work.root / rivals_file.FILENAME).exists()
    long = CliRunner().invoke(cli, [*words[:-1], "900"])
    assert long.exit_code == 1
    assert "901 tokens" in long.stderr


def test_an_engine_on_the_cpu_is_no_match_for_a_gpu(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EnvironmentFault, match="runs on the CPU"):
        bench_rivals(work.require("engine"), OPTIONS, save=lambda _: None, progress=Silent())


def test_there_must_be_a_dense_side(work: WorkDirectory) -> None:
    document = engine_document(dense_model=None)
    (work.require("engine") / "engine.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="dense baseline"):
        bench_rivals(
            work.require("engine"), OPTIONS, save=lambda _: None, progress=Silent(), device="cpu"
        )


@pytest.mark.parametrize(("free", "together"), [(200 << 30, True), (8 << 30, False)])
def test_sides_that_do_not_fit_together_run_one_by_one(
    work: WorkDirectory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free: int,
    together: bool,
) -> None:
    engine = work.require("engine")
    setting = bench.torch_compile.TorchSetting(
        shapes=bench.read_shapes(bench.read_engine(engine).model.parent),
        device="cpu",
        dtype=torch.bfloat16,
        progress=Silent(),
    )
    entries = (bench.ours.entry(engine, "dense"), bench.torch_compile.entry("int8", setting))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    assert bench._fit_together(entries, setting.shapes, OPTIONS) == together
    assert ("one after another" in caplog.text) == (not together)


def test_the_dense_model_in_integers_takes_part_where_there_is_one(
    work: WorkDirectory, tiny_export: Path
) -> None:
    folder = work.require("engine")
    document = engine_document() | {"stored_model": "../../export/current/dense/model.onnx"}
    (folder / "engine.json").write_text(json.dumps(document))
    entries = bench.ours.entries(folder)
    assert [entry.name for entry in entries] == [*NAMES[:2], "ours, dense in integers"]
    assert [entry.is_dense for entry in entries] == [True, False, False]
    assert entries[2].weight_bytes == (tiny_export / "dense" / "model.onnx.data").stat().st_size


def test_the_command_prints_a_table_and_json(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_cpu(*arguments: object, **options: object) -> Rivals:
        return bench_rivals(*arguments, **options, device="cpu")

    monkeypatch.setattr("nmexport.bench.rivals.bench.bench_rivals", on_cpu)
    words = ["bench", "rivals", "--work", str(work.root), "--context", "24", "--batch", "1"]
    words += ["--rival", "dense", "--no-prompts", "--runs", "3"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.output
    assert "decode, batch 1, context 24" in shown.stdout
    lines = [line.strip() for line in shown.stdout.splitlines()]
    lines = [line for line in lines if line.startswith(NAMES[:3])]
    assert [line.split("  ")[0] for line in lines] == list(NAMES[:3])
    assert lines[2].endswith("1.00x")
    assert "report.html shows it too" in " ".join(shown.stdout.split())
    assert "not measured" not in shown.stdout

    document = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert [row["name"] for row in document["rivals"]["times"]] == list(NAMES[:3])


def test_the_command_says_why_a_rival_has_no_times(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler")

    def on_cpu(*arguments: object, **options: object) -> Rivals:
        return bench_rivals(*arguments, **options, device="cpu")

    monkeypatch.setattr("nmexport.bench.rivals.bench.bench_rivals", on_cpu)
    monkeypatch.setattr("nmexport.bench.rivals.torch_compile.TorchCompiled.prepare", fail)
    words = ["bench", "rivals", "--work", str(work.root), "--context", "24", "--batch", "1"]
    shown = CliRunner().invoke(cli, [*words, "--no-prompts", "--runs", "3"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.stdout.split())
    assert "torch.compile, bfloat16 - - - - - - RuntimeError: no C compiler" in text
    assert "RuntimeError: no C compiler" in (work.root / "report.md").read_text()
