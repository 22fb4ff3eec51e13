"""`--weights int8` and `int4`, from calibration to files: linears, head and embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.runtimes import native
from nmexport.sparsity.quantisation import dequantised
from nmexport.sparsity.targets import linears_of
from nmexport.stages import fold
from nmexport.verification.reference import open_dense, open_folded

from tests.stages.test_fold import calibrated, folded, recipe_of
from tests.support.exported import export_stored, onnx_logits
from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.recipe import Recipe
    from nmexport.store.layers import LayerSpec

LEARNED = {"mitigations": ("l-pts", "ls", "gain", "bias", "low-rank"), "effort": "fast"}
DOWN = "model.layers.1.mlp.down_proj"


def recipe(folder: Path, weights: str, **sections: Any) -> Recipe:
    model = {"weights": weights, **sections.pop("model", {})}
    targets = {"targets": {"exclude": ("lm_head", DOWN)}}
    sparsity = {**targets, **sections.pop("sparsity", {})}
    return recipe_of(folder, model=model, sparsity=sparsity, **sections)


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(recipe_of(tiny_llama), tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module", params=["int8", "int4"])
def artifact(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    calibration: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> fold.Artifact:
    folder = tmp_path_factory.mktemp(request.param)
    return fold.Artifact(folded(recipe(tiny_llama, request.param), folder, calibration))


def test_every_linear_is_stored_the_head_in_8_bits(
    artifact: fold.Artifact, tiny_llama: Path
) -> None:
    model = load_model(resolve(recipe_of(tiny_llama).model))
    kind = artifact.layers[0].weight_type
    assert {layer.name for layer in artifact.linears} == set(linears_of(model))
    assert [layer.name for layer in artifact.dense_layers] == [DOWN, "lm_head"]
    assert [str(layer.pattern) for layer in artifact.dense_layers] == ["16:16", "16:16"]
    assert {layer.weight_type for layer in artifact.linears if layer.name != "lm_head"} == {kind}
    assert artifact.dense_layers[-1].weight_type == "int8"
    assert {layer.activation_bits for layer in artifact.linears} == {8}
    assert (artifact.embedding_bits, artifact.is_quantised) == (8, True)


def laid_out(artifact: fold.Artifact, layer: LayerSpec, weight: torch.Tensor) -> torch.Tensor:
    """A weight `[K, O]` with rows and columns where the folded model has them."""
    rows, reader = artifact.input_order(layer.name), layer.outputs_for
    columns = None if reader is None else artifact.input_order(reader)
    weight = weight if rows is None else weight[rows.long()]
    return weight if columns is None else weight[:, columns.long()]


def test_stored_weights_stand_for_the_models(artifact: fold.Artifact, tiny_llama: Path) -> None:
    """Sparse ones in gathered order; each as a dense one too."""
    model = load_model(resolve(recipe_of(tiny_llama).model))
    close = 0.01 if artifact.layers[0].weight_type == "int8" else 0.2
    for layer in artifact.linears:
        weight = model.get_submodule(layer.name).weight.detach().t()
        for tensors in (artifact.tensors(layer.name), artifact.dense_tensors(layer.name)):
            point = tensors.get("weight_zero_point")
            meant = dequantised(tensors["W"], tensors["weight_scale"], point)
            if "value_scale" in tensors:
                meant = tensors["value_scale"].unsqueeze(1) * meant
            order = tensors.get("channel_order")
            wanted = weight if order is None else weight[order.long()]
            is_sparse_one = tensors["W"].equal(artifact.tensors(layer.name)["W"])
            if is_sparse_one:
                wanted = laid_out(artifact, layer, wanted)
            assert float((meant - wanted).norm() / wanted.norm()) < close
            assert tensors["W"].dtype == torch.int8
    assert "channel_order" not in artifact.dense_tensors(artifact.layers[0].name)


def test_what_both_sides_round_in_8_bits_is_balanced(artifact: fold.Artifact) -> None:
    """Linears of one input alike, so that they stay one op; 4 bits are compensated instead."""
    forms = {tensors: getattr(artifact, tensors) for tensors in ("tensors", "dense_tensors")}
    for name, read in forms.items():
        scales = {layer.name: read(layer.name).get("value_scale") for layer in artifact.linears}
        balanced = {layer for layer, scale in scales.items() if scale is not None}
        if artifact.layers[0].weight_type == "int8":
            assert balanced == set(scales), name
            q, k, v = (scales[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
            assert q.equal(k)
            assert q.equal(v)
            assert float(q.std()) > 0
        else:
            assert balanced == {"lm_head"}, name


@pytest.fixture(scope="module")
def exported(
    artifact: fold.Artifact, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("export")
    export_stored(artifact, recipe_of(tiny_llama).model, output)
    return output


def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(3, VOCABULARY, (1, 12))


def test_the_file_computes_what_torch_computes(
    artifact: fold.Artifact, exported: Path, tiny_llama: Path
) -> None:
    """With the native op and without, and the very same embedding and head."""
    section = recipe_of(tiny_llama).model
    with open_folded(resolve(section), section, artifact) as session:
        expected = session.prefill(ids())
    for library in {None, native.find_library()}:
        actual = onnx_logits(
            exported / "model.onnx", ids(), np.ones_like(ids()), prefill=8, library=library
        )
        # A value that lies between two of 8 bits may fall to either.
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < 0.02


def test_no_float_matrix_is_left(exported: Path) -> None:
    for path in (exported / "model.onnx", exported / "dense" / "stored" / "model.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        large = [t for t in graph.initializer if np.prod(t.dims) > 1024 and len(t.dims) > 1]
        floats = {t.name for t in large if t.data_type == onnx.TensorProto.FLOAT}
        assert all(name.endswith("scale") for name in floats)
        kinds = {t.name: t.data_type for t in graph.initializer}
        assert kinds["lm_head.W"] == kinds["model.embed_tokens.weight.values"]
        assert kinds["lm_head.W"] == onnx.TensorProto.INT8


def test_the_dense_file_in_integers_is_near_the_dense_one(exported: Path, tiny_llama: Path) -> None:
    section = recipe_of(tiny_llama).model
    with open_dense(resolve(section), section) as session:
        expected = session.prefill(ids())
    graph = onnx.load(exported / "dense" / "stored" / "model.onnx", load_external_data=False).graph
    ours = [node for node in graph.node if node.op_type == "NMLinear"]
    patterns = {tuple(a.i for a in node.attribute if a.name in "nm") for node in ours}
    assert patterns == {(16, 16)}
    actual = onnx_logits(
        exported / "dense" / "stored" / "model.onnx", ids(), np.ones_like(ids()), prefill=8
    )
    four = any(t.data_type == onnx.TensorProto.INT4 for t in graph.initializer)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error < (0.25 if four else 0.03)


@pytest.mark.parametrize("weights", ["int8:32", "int4"])
def test_learned_constants_fold_into_stored_weights(
    tiny_llama: Path, calibration: Path, tmp_path: Path, weights: str
) -> None:
    """Shift, scales, gain, bias, low rank: what the floats would be, rounded."""
    made = {
        form: fold.Artifact(
            folded(
                recipe(tiny_llama, form, sparsity=LEARNED, model={"activations": "float"}),
                tmp_path / form.replace(":", "-"),
                calibration,
            )
        )
        for form in ("float", weights)
    }
    plain, stored = made["float"], made[weights]
    name = plain.layers[0].name
    tensors = stored.tensors(name)
    meant = dequantised(tensors["W"], tensors["weight_scale"], tensors.get("weight_zero_point"))
    wanted = plain.tensors(name)["W"]
    assert float((meant - wanted).norm() / wanted.norm()) < (0.01 if weights != "int4" else 0.2)
    for kind in ("bias", "shift", "channel_order"):
        torch.testing.assert_close(tensors[kind], plain.tensors(name)[kind])
    assert {layer.activation_bits for layer in stored.linears} == {0}


def test_without_a_baseline_nothing_is_stored_twice(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    alone = recipe(tiny_llama, "int8", model={"dense_baseline": False})
    artifact = fold.Artifact(folded(alone, tmp_path, calibration))
    name = artifact.layers[0].name
    assert artifact.dense_tensors(name).keys() == artifact.tensors(name).keys()
