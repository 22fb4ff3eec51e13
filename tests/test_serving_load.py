"""The load of `bench serve`: the same on both sides, all of it answered, figures that add up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.progress import Silent
from nmexport.serving import load as loads
from nmexport.serving.load import Load, compare

from tests.served import engine_document
from tests.test_serving_scheduler import CountingSession, letters

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

LOAD = Load(concurrency=3, requests=7, prompt_tokens=5, output_tokens=4, prefill_chunk=2)


def test_both_sides_get_the_same_load_and_answer_all_of_it() -> None:
    sessions = {side: CountingSession() for side in loads.SIDES}
    row = compare(sessions, LOAD, decode=letters, rounds=2, seed=3, progress=Silent())
    dense, sparse = (sorted(sessions[side].calls) for side in loads.SIDES)
    assert dense == sparse
    tokens = sum(len(call) for call in dense)
    assert tokens == 3 * 7 * (5 + 3)  # a warm-up and two rounds; the last token is not run
    for side in loads.SIDES:
        assert row[side]["tokens_per_s"] > 0
        for name in ("ttft", "itl"):
            times = row[side][name]
            assert 0 < times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"]
    assert row["speedup"] == pytest.approx(
        row["sparse"]["tokens_per_s"] / row["dense"]["tokens_per_s"], abs=0.02
    )


def test_a_slower_side_shows() -> None:
    class Slow(CountingSession):
        def extend(self, cache: Any, input_ids: np.ndarray) -> tuple[np.ndarray, Any]:
            sum(range(20_000))
            return super().extend(cache, input_ids)

    sessions = {"dense": Slow(), "sparse": CountingSession()}
    row = compare(sessions, LOAD, decode=letters, rounds=3, seed=0, progress=Silent())
    assert row["speedup"] > 1.5
    assert row["dense"]["itl"]["p50_ms"] > row["sparse"]["itl"]["p50_ms"]


def test_a_failing_model_measures_nothing() -> None:
    broken = CountingSession()
    broken.extend = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    sessions = {"dense": broken, "sparse": CountingSession()}
    with pytest.raises(RuntimeError, match="failed"):
        compare(sessions, LOAD, decode=letters, rounds=1, seed=0, progress=Silent())


def test_bench_serve_shows_a_table_and_json(tiny_export: Path, tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("model:\n  id: tiny\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "current").symlink_to(tiny_export, target_is_directory=True)
    engine = tmp_path / "engine" / "current"
    engine.mkdir(parents=True)
    (engine / "engine.json").write_text(json.dumps(engine_document()))
    (engine / "manifest.json").write_text("{}")
    words = ["bench", "serve", "--work", str(tmp_path), "--clients", "2", "--requests", "2"]
    words += ["--prompt-tokens", "4", "--output-tokens", "3", "--rounds", "1"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.output
    assert "2 clients, sparse" in shown.stdout
    document = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    (row,) = document["results"]
    assert row["concurrency"] == 2
    assert row["sparse"]["tokens_per_s"] > 0
