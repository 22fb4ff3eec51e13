"""A build without the dense model: still a report and a package, with nulls where two compare."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from nmexport.errors import ArtifactError
from nmexport.models.source import ModelSource
from nmexport.recipe import GatesSection, ModelSection
from nmexport.report.model import json_of
from nmexport.runtimes.opening import open_session
from nmexport.selection import Selection
from nmexport.stages import package, verify
from nmexport.store.work_directory import WorkDirectory
from nmexport.verification import alone

from tests.report.test_pages import FIXED, assert_has_keys
from tests.stages.test_engine import RECIPE
from tests.support.pipelines import pipeline_in

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    recipe = RECIPE.model_copy(
        update={
            "model": ModelSection(id="tiny", dense_baseline=False),
            "gates": GatesSection(max_peak_rss_bytes=1 << 40),
        }
    )
    work = WorkDirectory(tmp_path_factory.mktemp("alone") / "w")
    source = ModelSource(
        id="tiny", revision=None, folder=tiny_llama, gguf_file=None, digest="1" * 64
    )
    pipeline_in(work.root, recipe, source).run(Selection())
    return work


def test_what_compares_is_null_with_a_reason(built: WorkDirectory) -> None:
    report = json_of(verify.Artifact(built.require("verify")).report)
    assert_has_keys(report, FIXED)
    accuracy, latency = report["accuracy"], report["latency"]
    assert accuracy["sparse"]["perplexity"] > 1
    assert accuracy["tokens"] == 3 * 47
    assert latency["sparse"]["decode"]["p50_ms"] > 0
    for section, name in (
        (accuracy, "perplexity_ratio"),
        (accuracy, "kl_mean"),
        (accuracy["dense"], "perplexity"),
        (latency["dense"]["decode"], "p50_ms"),
        (latency["speedup"], "decode"),
        (report["memory"]["dense"], "peak_rss_bytes"),
    ):
        assert section[name] is None
    for section in (accuracy, latency["speedup"], report["memory"]["dense"]):
        assert section["why"] == alone.WHY
    assert report["sparsity"]["achieved"] == 0.5
    assert all(layer["relative_error"] is None for layer in report["sparsity"]["layers"])
    assert report["notes"][0] == alone.NOTE
    dense = report["parity"]["dense"]
    assert dense["error"] < 1e-4, "held against torch by a dense file that is not kept"
    assert not (built.require("export") / "dense").exists()
    assert report["verdict"] == "pass"  # of the one gate that needs no baseline


def test_pages_say_not_measured(built: WorkDirectory) -> None:
    for end in ("html", "md"):
        text = (built.root / f"report.{end}").read_text("utf-8")
        assert "not measured" in text
        assert "not measuredx" not in text
        assert "not measured ms" not in text
        assert "None" not in text.partition("resolved.yaml")[0]


def test_the_package_is_there_and_the_engine_names_no_missing_file(built: WorkDirectory) -> None:
    assert package.Artifact(built.require("package")).bundle.verdict == "pass"
    engine = built.require("engine")
    assert json.loads((engine / "engine.json").read_text("utf-8"))["dense_model"] is None
    with pytest.raises(ArtifactError, match="has no dense model"):
        open_session(engine, side="dense")
