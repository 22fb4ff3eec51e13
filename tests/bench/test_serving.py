"""The load of `bench serve`: the same on both sides, all of it answered, figures that add up."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from nmexport.bench import serving as loads
from nmexport.bench.serving import Load, compare
from nmexport.cli.main import cli
from nmexport.environment import Gpu, probe
from nmexport.generation.tokenizer import Tokenizer
from nmexport.progress import Silent
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.onnxruntime_opening import RUNTIME
from nmexport.runtimes.onnxruntime_session import OrtSession

from tests.serving.test_scheduler import CountingSession, letters
from tests.support.served import engine_document, streaming

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from nmexport.runtimes.engine import Side

LOAD = Load(concurrency=3, requests=7, prompt_tokens=5, output_tokens=4, prefill_chunk=2)


def within(**sessions: CountingSession) -> dict[str, Any]:
    return {side: loads._within(session, letters) for side, session in sessions.items()}


def test_both_sides_get_the_same_load_and_answer_all_of_it() -> None:
    sessions = {side: CountingSession() for side in loads.SIDES}
    row = compare(within(**sessions), LOAD, rounds=2, seed=3, progress=Silent())
    dense, sparse = (sorted(sessions[side].calls) for side in loads.SIDES)
    assert dense == sparse
    tokens = sum(len(call) for call in dense)
    assert tokens == 3 * 7 * (5 + 3)  # a warm-up and two rounds; the last token is not run
    for side in loads.SIDES:
        times = row.sides[side]
        assert times.tokens_per_s > 0
        for waits in (times.ttft, times.itl):
            assert 0 < waits.p50_ms <= waits.p90_ms <= waits.p99_ms
    assert row.speedup == pytest.approx(
        row.sides["sparse"].tokens_per_s / row.sides["dense"].tokens_per_s, abs=0.02
    )


def test_a_slower_side_shows() -> None:
    class Slow(CountingSession):
        def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
            sum(range(20_000))
            return super().extend(cache, input_ids)

    sides = within(dense=Slow(), sparse=CountingSession())
    row = compare(sides, LOAD, rounds=3, seed=0, progress=Silent())
    assert row.speedup > 1.5
    assert row.sides["dense"].itl.p50_ms > row.sides["sparse"].itl.p50_ms


def test_a_failing_model_measures_nothing() -> None:
    broken = CountingSession()
    broken.extend = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    sides = within(dense=broken, sparse=CountingSession())
    with pytest.raises(RuntimeError, match="failed"):
        compare(sides, LOAD, rounds=1, seed=0, progress=Silent())


@pytest.fixture
def work(tiny_export: Path, tmp_path: Path) -> Path:
    """A work directory with an engine and a report."""
    (tmp_path / "resolved.yaml").write_text("model:\n  id: tiny\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "current").symlink_to(tiny_export, target_is_directory=True)
    engine = tmp_path / "engine" / "current"
    engine.mkdir(parents=True)
    (engine / "engine.json").write_text(json.dumps(engine_document()))
    (engine / "manifest.json").write_text("{}")
    accuracy = {"dense": {"perplexity": 12.25}, "sparse": {"perplexity": 13.75}}
    report = {"schema": 1, "verdict": "none", "accuracy": {"dataset": "some text", **accuracy}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def serve_words(work: Path) -> list[str]:
    words = ["bench", "serve", "--work", str(work), "--clients", "2", "--requests", "2"]
    return [*words, "--prompt-tokens", "4", "--output-tokens", "3", "--rounds", "1"]


def test_bench_serve_shows_a_table_and_json(work: Path) -> None:
    shown = CliRunner().invoke(cli, serve_words(work))
    assert shown.exit_code == 0, shown.output
    assert "2 clients, sparse" in shown.stdout
    assert f"{RUNTIME} on {probe().cpu}" in " ".join(shown.stdout.split())
    dense, sparse = (line for line in shown.stdout.splitlines() if "2 clients" in line)
    assert dense.rstrip().endswith("12.2")
    assert sparse.rstrip().endswith("13.8")
    assert "on some text" in shown.stdout
    document = json.loads(CliRunner().invoke(cli, [*serve_words(work), "--json"]).stdout)
    (row,) = document["results"]
    assert set(row) == {*vars(LOAD), "rounds", *loads.SIDES, "speedup"}
    assert row["concurrency"] == 2
    assert set(row["dense"]["ttft"]) == {"p50_ms", "p90_ms", "p99_ms"}
    assert row["sparse"]["tokens_per_s"] > 0
    assert document["perplexity"]["sparse"] == 13.75
    (work / "report.json").unlink()
    bare = CliRunner().invoke(cli, serve_words(work))
    assert bare.exit_code == 0
    assert "some text" not in bare.stdout


def test_a_run_on_the_gpu_is_called_one(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = engine_document(provider="cuda")
    (work / "engine" / "current" / "engine.json").write_text(json.dumps(document))

    def on_the_processor(path: Path, *, side: Side = "sparse", elsewhere: bool) -> OrtSession:
        assert not elsewhere
        return OrtSession(read_engine(path).exported(side), threads=1)

    gpu = Gpu(name="Some GPU", driver="1", compute_capability="9.0", memory_bytes=80 << 30)
    here = replace(probe(), gpus=(gpu,))
    monkeypatch.setattr(OrtSession, "from_engine", on_the_processor)
    monkeypatch.setattr("nmexport.environment.probe", lambda: here)
    shown = CliRunner().invoke(cli, [*serve_words(work), "--json"])
    assert json.loads(shown.stdout)["device"] == "Some GPU, 80 GiB"


def test_a_servers_clients_are_a_side(work: Path) -> None:
    tokenizer = Tokenizer(work / "export" / "current")
    with streaming(pieces=4) as (url, seen):
        sides = within(dense=CountingSession(), sparse=CountingSession())
        sides[loads.THROUGH] = loads._through(loads.Through(url=url, model="m"), tokenizer)
        load = Load(concurrency=2, requests=5, prompt_tokens=40, output_tokens=4)
        row = compare(sides, load, rounds=2, seed=0, progress=Silent())
    assert len(seen) == 3 * 5
    assert {(one["max_tokens"], one["temperature"]) for one in seen} == {(4, 0.0)}
    assert len(tokenizer.encode(seen[0]["text_input"])) == pytest.approx(40, abs=4)
    times = row.sides[loads.THROUGH]
    assert times.itl.p50_ms >= 1
    assert 0 < times.tokens_per_s < 2 * 4 * 1000 / 4
    assert row.speedup > 0
