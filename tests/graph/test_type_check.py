"""Types of an exported file: looked at once for each kind of node, as if it were for each node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx.shape_inference
import pytest
from nmexport.errors import InternalError
from nmexport.graph.type_check import check_types, one_of_each_kind
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from tests.support.exported import Exported

PATH = Path("model.onnx")
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model_of(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes that read `x`, `scale`, both also in half precision, and make `y` from there."""
    inputs = [
        helper.make_tensor_value_info(f"{name}{suffix}", kind, shape)
        for name, shape in (("x", ["n", 4]), ("scale", [4]))
        for suffix, kind in (("", FLOAT), ("_half", HALF))
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for node in nodes for name in node.output]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def norm(x: str, scale: str, y: str) -> onnx.NodeProto:
    return helper.make_node("RMSNormalization", [x, scale], [y])


def test_a_standard_body_is_looked_at_in_every_type() -> None:
    """The standard lets x and scale differ; the operator's own body multiplies them."""
    sound = [norm("x", "scale", "y0"), norm("x", "scale", "y1"), norm("x_half", "scale_half", "y2")]
    check_types(PATH, model_of(*sound))
    with pytest.raises(InternalError, match=r"model\.onnx is not well typed"):
        check_types(PATH, model_of(*sound, norm("x_half", "scale", "y3")))


def test_a_node_that_other_types_reach_is_of_another_kind() -> None:
    def kinds(*nodes: onnx.NodeProto) -> int:
        inferred = onnx.shape_inference.infer_shapes(model_of(*nodes))
        return len(one_of_each_kind(inferred).graph.node)

    sine = helper.make_node("Sin", ["x"], ["a"])
    assert kinds(sine, helper.make_node("Sin", ["x"], ["b"])) == 1
    assert kinds(sine, helper.make_node("Sin", ["a"], ["b"])) == 1
    assert kinds(sine, helper.make_node("Sin", ["x_half"], ["b"])) == 2
    assert kinds(sine, helper.make_node("Sin", ["scale"], ["b"])) == 2
    assert kinds(sine, helper.make_node("Cos", ["x"], ["b"])) == 2
    casts = [helper.make_node("Cast", ["x"], [f"c{to}"], to=to) for to in (FLOAT, HALF)]
    assert kinds(*casts) == 2


def test_layers_are_alike(plain_export: Exported) -> None:
    for path in (plain_export.model, plain_export.dense_model):
        model = onnx.load(path, load_external_data=False)
        check_types(path, model)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        kept = one_of_each_kind(inferred)
        onnx.shape_inference.infer_shapes(kept, check_type=True, strict_mode=True)
        assert len(kept.graph.node) < 0.8 * len(model.graph.node)
        names = {(node.domain, node.op_type, node.overload) for node in model.graph.node}
        assert {(node.domain, node.op_type, node.overload) for node in kept.graph.node} == names


def test_a_body_of_ours_is_looked_at(plain_export: Exported) -> None:
    model = onnx.load(plain_export.model, load_external_data=False)
    body = next(item for item in model.functions if item.name == "NMLinear")
    product = next(node for node in body.node if node.op_type == "MatMul")
    body.node.insert(0, helper.make_node("Cast", [body.input[1]], ["narrow"], to=HALF))
    product.input[1] = "narrow"
    with pytest.raises(InternalError, match="not well typed"):
        check_types(plain_export.model, model)
