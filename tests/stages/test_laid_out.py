"""Folded models whose MLPs lie in the order of their last linear: equal logits, no gather."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from nmexport.calibration import producers
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.runtimes import native
from nmexport.sparsity.output_order import NATURAL
from nmexport.stages import exporting, fold
from nmexport.verification.reference import open_folded

from tests.stages.test_fold import calibrated, folded, recipe_of
from tests.support.exported import onnx_logits
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.recipe import Recipe

FEEDS = {
    "llama": ("mlp.down_proj", {"mlp.gate_proj", "mlp.up_proj"}),
    "phi3": ("mlp.down_proj", {"mlp.gate_up_proj"}),
    "gpt_neox": ("mlp.dense_4h_to_h", {"mlp.dense_h_to_4h"}),
}
IDS = np.random.default_rng(3).integers(3, VOCABULARY, (1, 12))
SHIFTED = {"criterion": "wina", "mitigations": ("s-pts", "s-var"), "grouping": "balanced"}


def both(
    recipe: Recipe, calibration: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[fold.Artifact, fold.Artifact]:
    """Folded with a layout and without one."""
    laid_out = fold.Artifact(folded(recipe, folder / "laid-out", calibration))
    monkeypatch.setattr(producers, "output_orders", lambda *_: NATURAL)
    return laid_out, fold.Artifact(folded(recipe, folder / "natural", calibration))


def logits_of(recipe: Recipe, artifact: fold.Artifact) -> np.ndarray:
    with open_folded(resolve(recipe.model), recipe.model, artifact) as session:
        return session.prefill(IDS)


def assert_same(made: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(made - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("family", FEEDS)
def test_logits_are_those_of_a_fold_that_gathers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_tiny_model(model, family)
    recipe = recipe_of(model, sparsity=SHIFTED)
    laid_out, natural = both(recipe, calibrated(recipe, tmp_path), tmp_path, monkeypatch)
    reader, feeding = FEEDS[family]
    found = {layer.name: layer.outputs_for for layer in laid_out.layers if layer.outputs_for}
    assert len(found) == 2 * len(feeding)
    for name, read_by in found.items():
        block = name.rpartition("mlp.")[0]
        assert name.removeprefix(block) in feeding
        assert read_by == f"{block}{reader}"
        assert "channel_order" not in laid_out.tensors(read_by)
        order = natural.tensors(read_by)["channel_order"]
        assert order.equal(laid_out.input_order(read_by))
    assert not any(layer.outputs_for for layer in natural.layers)
    assert_same(logits_of(recipe, laid_out), logits_of(recipe, natural))


@pytest.mark.parametrize("weights", ["float", "int4"])
def test_files_compute_the_same_and_gather_less(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Sparse, and of integers dense too."""
    recipe = recipe_of(tiny_llama, model={"weights": weights, "activations": "float"})
    artifacts = both(recipe, calibrated(recipe, tmp_path), tmp_path, monkeypatch)
    model = load_model(resolve(recipe.model))
    traced = exporting.trace_model(model, [layer.name for layer in artifacts[0].linears])
    made = []
    for place, artifact in enumerate(artifacts):
        output = tmp_path / str(place)
        output.mkdir()
        stored = None
        if artifact.is_quantised:
            stored = exporting.Stored(lambda: None, artifact.dense_tensors)
        exporting.write_models(traced, artifact.linears, artifact.tensors, output, stored=stored)
        made.append(output)
    library, mask = native.find_library(), np.ones_like(IDS)
    for file in ("model.onnx", *(["dense/stored/model.onnx"] if weights != "float" else [])):
        laid_out, natural = (
            onnx_logits(folder / file, IDS, mask, prefill=8, library=library) for folder in made
        )
        assert_same(laid_out, natural)
    assert ordered(made[1]) - ordered(made[0]) == {
        f"model.layers.{layer}.mlp.down_proj" for layer in range(2)
    }


def ordered(folder: Path) -> set[str]:
    """Names of the nodes that gather their input."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {
        node.name
        for node in graph.node
        if node.op_type == "NMLinear" and any(one.endswith(".channel_order") for one in node.input)
    }


@pytest.mark.parametrize("left_dense", ["gate_proj", "up_proj"])
def test_linears_that_feed_with_a_dense_one_keep_their_order(
    tiny_llama: Path, tmp_path: Path, left_dense: str
) -> None:
    """The dense one's weight is the checkpoint's own."""
    recipe = recipe_of(tiny_llama, sparsity={"targets": {"exclude": ("lm_head", left_dense)}})
    artifact = fold.Artifact(folded(recipe, tmp_path, calibrated(recipe, tmp_path)))
    assert not any(layer.outputs_for for layer in artifact.layers)
    assert "channel_order" in artifact.tensors("model.layers.0.mlp.down_proj")


def test_a_phase_that_stays_dense_is_dense_still(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_llama, sparsity={"phases": "decode", "mitigations": ("s-pts",)})
    artifact = fold.Artifact(folded(recipe, tmp_path, calibrated(recipe, tmp_path)))
    assert any(layer.outputs_for for layer in artifact.layers)
    model = load_model(resolve(recipe.model))
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    made = logits_of(recipe, artifact)
    assert np.abs(made - expected[:, -made.shape[1] :]).max() <= 1e-4 * expected.std()
