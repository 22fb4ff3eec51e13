"""Which nodes become a region, what it says of them, and what leaves it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from nmexport.graph.contract import op_contract
from nmexport.graph.fused import FUSED
from nmexport.graph.regions import GroupIntoRegions

WIDTH = 16


class Drawing:
    """A graph that is drawn node by node."""

    def __init__(self) -> None:
        opsets = {"": 23, FUSED: 1, op_contract().domain: op_contract().opset_version}
        self.graph = ir.Graph([], [], nodes=[], opset_imports=opsets)
        self.weight = self.constant("w", np.ones((WIDTH, WIDTH), np.float32))
        self.scale = self.constant("s", np.ones(WIDTH, np.float32))

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def input(self, name: str) -> ir.Value:
        value = ir.val(name, dtype=ir.DataType.FLOAT, shape=[1, "T", WIDTH])
        self.graph.inputs.append(value)
        return value

    def node(
        self, domain: str, op: str, inputs: list[ir.Value | None], *attributes: ir.Attr
    ) -> ir.Value:
        node = ir.Node(domain, op, inputs, attributes)
        node.outputs[0].dtype = ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape([1, "T", WIDTH])
        self.graph.append(node)
        return node.outputs[0]

    def linear(self, x: ir.Value, weight: ir.Value | None = None) -> ir.Value:
        pattern = [ir.AttrInt64("n", 8), ir.AttrInt64("m", 16)]
        inputs = [x, self.weight if weight is None else weight]
        return self.node(op_contract().domain, "NMLinear", inputs, *pattern)

    def norm(self, x: ir.Value) -> ir.Value:
        return self.node(FUSED, "Norm", [x, self.scale], ir.AttrFloat32("epsilon", 1e-5))

    def grouped(self, *outputs: ir.Value) -> list[ir.Node]:
        self.graph.outputs.extend(outputs)
        GroupIntoRegions()(ir.Model(self.graph, ir_version=10))
        return list(self.graph)


def ops(nodes: list[ir.Node]) -> list[str]:
    return [node.op_type for node in nodes]


def test_nodes_that_follow_each_other_are_one() -> None:
    draw = Drawing()
    x = draw.input("x")
    normed = draw.norm(x)
    result = draw.linear(normed)
    result.name = "y"
    (region,) = draw.grouped(result)
    assert [value.name for value in region.inputs] == ["x", "s", "w"]
    assert [value.name for value in region.outputs] == ["y"]
    said = {name: attribute.value for name, attribute in region.attributes.items()}
    assert said == {
        "nodes": 2,
        "outputs": (4,),
        "node0_op": "Norm",
        "node0_inputs": (0, 1),
        "node0_outputs": (3,),
        "node0_epsilon": np.float32(1e-5),
        "node1_op": "NMLinear",
        "node1_inputs": (3, 2),
        "node1_outputs": (4,),
        "node1_n": 8,
        "node1_m": 16,
    }


def test_what_is_needed_outside_leaves() -> None:
    draw = Drawing()
    first = draw.norm(draw.input("x"))
    second = draw.linear(first)
    beside = draw.node("", "Tanh", [first])
    region, tanh = draw.grouped(second, beside)
    assert ops([region, tanh]) == ["Region", "Tanh"]
    assert len(region.outputs) == 2
    assert tanh.inputs[0] is region.outputs[0]


def test_another_node_that_waits_for_nothing_goes_in_front() -> None:
    draw = Drawing()
    x = draw.input("x")
    first = draw.norm(x)
    other = draw.node("", "Tanh", [x])
    both = draw.node(FUSED, "GatedSiluPair", [first, other])
    assert ops(draw.grouped(both)) == ["Tanh", "Region"]


def test_another_node_between_parts_a_run() -> None:
    draw = Drawing()
    first = draw.linear(draw.norm(draw.input("x")))
    between = draw.node("", "Tanh", [draw.node("", "Neg", [first])])
    last = draw.linear(draw.norm(between))
    assert ops(draw.grouped(last)) == ["Region", "Neg", "Tanh", "Region"]


def test_one_node_alone_stays() -> None:
    draw = Drawing()
    assert ops(draw.grouped(draw.norm(draw.input("x")))) == ["Norm"]


def test_weights_that_are_computed_stay_outside() -> None:
    draw = Drawing()
    turned = draw.node("", "Transpose", [draw.weight])
    first = draw.norm(draw.norm(draw.input("x")))
    nodes = draw.grouped(draw.linear(first, turned))
    assert sorted(ops(nodes)) == ["NMLinear", "Region", "Transpose"]


def test_other_types_stay_outside() -> None:
    draw = Drawing()
    half = draw.norm(draw.norm(draw.input("x")))
    for node in draw.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT16
    assert ops(draw.grouped(half)) == ["Norm", "Norm"]
