"""A whole build with `--weights int8`: three models side by side in one report, and a package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nmexport.models.source import ModelSource
from nmexport.recipe import ModelSection
from nmexport.runtimes import native
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_session
from nmexport.selection import Selection
from nmexport.stages import verify
from nmexport.store.work_directory import WorkDirectory

from tests.stages.test_engine import RECIPE
from tests.support.pipelines import pipeline_in

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    recipe = RECIPE.model_copy(update={"model": ModelSection(id="tiny", weights="int8")})
    work = WorkDirectory(tmp_path_factory.mktemp("integers") / "w")
    source = ModelSource(
        id="tiny", revision=None, folder=tiny_llama, gguf_file=None, digest="1" * 64
    )
    pipeline_in(work.root, recipe, source).run(Selection())
    return work


def test_the_three_models_are_in_one_report(built: WorkDirectory) -> None:
    report = verify.Artifact(built.require("verify")).report
    between = report.stored_dense
    assert between is not None
    assert between.scores.tokens == report.accuracy.tokens
    assert between.scores.dense.perplexity == pytest.approx(report.accuracy.dense.perplexity)
    assert between.scores.perplexity_ratio == pytest.approx(1.0, abs=0.02)
    assert between.scores.kl_mean < report.accuracy.kl_mean
    for side in (between.latency.dense, between.latency.sparse):
        assert side.decode.p50_ms > 0
        assert side.prefill.p50_ms > 0
    assert between.latency.speedup.decode > 0
    assert between.stored_bytes < 0.45 * between.dense_bytes
    assert between.sparse_bytes < 0.5 * between.dense_bytes
    assert "dense int8" in (built.root / "report.md").read_text("utf-8")


def test_all_linears_agree_with_the_oracle_head_and_dense_ones_too(built: WorkDirectory) -> None:
    parity = verify.Artifact(built.require("verify")).report.parity
    legs = {"torch": parity.linears.torch, "onnx": parity.linears.onnx}
    if native.find_library() is not None:
        legs["engine"] = parity.linears.engine
    for name, leg in legs.items():
        assert leg.within_contract, name
        assert leg.linears == 15  # 14 of the layers, and the head


def test_the_engine_opens_each_of_them(built: WorkDirectory) -> None:
    engine = built.require("engine")
    stored = read_engine(engine).stored_model
    assert stored is not None
    assert stored.is_file()
    with open_session(engine, side="stored") as between, open_session(engine) as sparse:
        assert between.vocabulary_size == sparse.vocabulary_size
        assert type(between) is type(sparse), "what is compared runs in one way"


def test_the_package_leaves_what_only_measures_behind(built: WorkDirectory) -> None:
    package = built.require("package")
    assert not list(package.rglob("dense"))
    assert all(read_engine(path).stored_model is None for path in package.rglob("engine.json"))
