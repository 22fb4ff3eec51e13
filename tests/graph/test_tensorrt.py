"""What is changed in a graph for TensorRT's parser, and that it computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nmexport.graph import tensorrt
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from onnx import TensorProto, helper

import onnxruntime
from tests.support.exported import export_folder, onnx_logits
from tests.support.tiny import FAMILIES, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

CAPACITY = 24
IDS = np.random.default_rng(0).integers(3, 300, (2, 12))
STEPS = [(0, 6), (6, 10), (10, 11), (11, 12)]


def in_place_logits(model: ir.Model, folder: Path) -> np.ndarray:
    """Logits of a model with a cache of fixed capacity, garbage where nothing was written."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    batch = len(IDS)
    caches = {
        value.name: np.full((batch, *value.shape[1:]), 7.0, np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    logits = []
    for start, end in STEPS:
        mask = np.zeros((batch, CAPACITY), np.int64)
        mask[:, :end] = 1
        feeds = {
            "input_ids": IDS[:, start:end],
            "attention_mask": mask,
            "position_ids": np.tile(np.arange(start, end), (batch, 1)),
            "write_indices": np.full(batch, start),
        }
        first, *present = session.run(None, {**feeds, **caches})
        caches = dict(zip(caches, present, strict=True))
        logits.append(first)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_familys_cache_is_updated_in_place(tmp_path: Path, family: str) -> None:
    save_tiny_model(tmp_path / "model", family)
    check_in_place(export_folder(tmp_path / "model", tmp_path).dense_model)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    behaviour = Behaviour(pattern=NMPattern(8, 16))
    folder = tmp_path_factory.mktemp("llama")
    return export_folder(tiny_llama, folder, behaviour=behaviour, constants=Constants()).model


def check_in_place(path: Path) -> None:
    wanted = onnx_logits(path, IDS, np.ones_like(IDS), prefill=6)
    model = ir.load(path)
    tensorrt.CacheInPlace(CAPACITY)(model)
    np.testing.assert_allclose(in_place_logits(model, path.parent), wanted, rtol=1e-4, atol=1e-5)


def test_a_cache_in_place_computes_the_same(llama: Path) -> None:
    check_in_place(llama.parent / "dense" / "model.onnx")


def test_a_concatenated_cache_computes_the_same(llama: Path, tmp_path: Path) -> None:
    path = llama.parent / "dense" / "model.onnx"
    model = ir.load(path)
    tensorrt.ConcatenateCache()(model)
    changed = path.with_name("concatenated.onnx")
    onnx.save(ir.to_proto(model), changed)
    mask = np.ones_like(IDS)
    np.testing.assert_allclose(
        onnx_logits(changed, IDS, mask, prefill=6),
        onnx_logits(path, IDS, mask, prefill=6),
        rtol=1e-4,
        atol=1e-5,
    )
    for node in model.graph:
        if node.op_type == "Attention":
            assert len(node.outputs) == 1
            assert node.attributes["scale"].as_float() == 1.0


def test_no_shape_depends_on_a_run(llama: Path) -> None:
    rewritten = tensorrt.for_tensorrt(llama, capacity=CAPACITY)
    assert (rewritten.in_place, rewritten.why_not_in_place) == (True, None)
    assert rewritten.fused_attention == 2
    graph = rewritten.model.graph
    shapes = {value.name: list(value.shape) for value in graph.inputs}
    assert shapes["past_key_values.0.key"] == ["batch_size", 2, CAPACITY, 16]
    assert shapes["attention_mask"] == ["batch_size", CAPACITY]
    assert shapes["write_indices"] == ["batch_size"]
    assert "past_sequence_length" not in str(shapes)
    past = next(value for value in graph.inputs if value.name == "past_key_values.0.key")
    assert [usage.node.op_type for usage in past.uses()] == ["TensorScatter"]


def test_nodes_name_the_inputs_they_have(llama: Path) -> None:
    nodes = [n for n in tensorrt.for_tensorrt(llama, capacity=None).model.graph if n.domain]
    assert nodes
    assert {n.attributes["present_inputs"].as_string() for n in nodes} == {"X,W"}
    assert {len(n.inputs) for n in nodes} == {2}


def linear_with(inputs: list[str]) -> ir.Model:
    float16 = TensorProto.FLOAT16
    node = helper.make_node("NMLinear", inputs, ["y"], domain="nmexport", n=8, m=16, name="one")
    values = [helper.make_tensor_value_info(name, float16, None) for name in inputs if name]
    graph = helper.make_graph(
        [node], "g", values, [helper.make_tensor_value_info("y", float16, None)]
    )
    return ir.from_proto(helper.make_model(graph))


def test_absent_inputs_are_dropped_and_the_rest_named() -> None:
    model = linear_with(["x", "w", "", "", "", "scale", ""])
    tensorrt.NamePresentInputs()(model)
    (node,) = model.graph
    assert [value.name for value in node.inputs] == ["x", "w", "scale"]
    assert node.attributes["present_inputs"].as_string() == "X,W,score_scale"


def cached_graph(*nodes: onnx.NodeProto) -> ir.Model:
    tensor = helper.make_tensor_value_info
    states = ["batch_size", 2, "past_sequence_length", 4]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [
            tensor("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
            tensor("past_key_values.0.key", TensorProto.FLOAT, states),
        ],
        [tensor("y", TensorProto.INT64, None)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("Shape", ["past_key_values.0.key"], "y", {})], "whole shape"),
        ([("Cast", ["past_key_values.0.key"], "y", {"to": 7})], "is used by Cast"),
        (
            [
                ("Shape", ["past_key_values.0.key"], "length", {"start": 2, "end": 3}),
                ("ConstantOfShape", ["length"], "y", {}),
            ],
            "makes a shape from the number of cached tokens",
        ),
        ([("Shape", ["input_ids"], "y", {})], None),
    ],
)
def test_graphs_that_use_their_cache_otherwise_are_left_alone(
    nodes: list[tuple], said: str | None
) -> None:
    model = cached_graph(
        *(helper.make_node(op, given, [out], **more) for op, given, out, more in nodes)
    )
    if said is None:
        tensorrt.CacheInPlace(CAPACITY)(model)
        return
    with pytest.raises(ir.passes.PreconditionError, match=said):
        tensorrt.CacheInPlace(CAPACITY)(model)


def test_a_graph_without_a_cache_is_told() -> None:
    with pytest.raises(ir.passes.PreconditionError, match="no cache"):
        tensorrt.CacheInPlace(CAPACITY)(linear_with(["x", "w"]))


def test_what_cannot_be_in_place_is_concatenated(llama: Path, tmp_path: Path) -> None:
    model = ir.load(llama)
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
    odd = ir.node("Cast", [past], {"to": 10})
    model.graph.append(odd)
    odd.outputs[0].name = "odd"
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(model), path)
    rewritten = tensorrt.for_tensorrt(path, capacity=CAPACITY)
    assert not rewritten.in_place
    assert "past_key_values.0.key is used by Cast" in str(rewritten.why_not_in_place)
    assert any(node.op_type == "Concat" for node in rewritten.model.graph)
