"""From one traced graph to two models: sparse with our op, dense with `MatMul`.

Both have the same nodes but for the linears, so a comparison of the two compares the linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from nmexport.errors import InternalError
from nmexport.graph.contract import op_contract
from nmexport.graph.functions import IR_VERSION, function_protos_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from nmexport.layers import LayerSpec

LAYER_ATTRIBUTE = "layer"
"""Attribute of a traced NMLinear node that holds the dotted name of its linear."""

LINEAR = "NMLinear"

ALIGNMENT = 4096  # bytes: a page, so that a runtime can map a weight as it lies in the file
_ALIGN_FROM = 16384  # bytes: below this, padding would outweigh the constant
_EXTERNAL_FROM = 1024  # bytes: shapes and scalars stay readable in the model file itself


@dataclass(frozen=True)
class DenseWeights:
    """What a dense linear `x @ weight + bias` reads."""

    weight: ir.TensorProtocol
    """`[K, O]`."""
    bias: ir.TensorProtocol | None
    """`[O]`."""


def assemble_sparse(
    traced: ir.Model,
    layers: Mapping[str, LayerSpec],
    constants: Callable[[str], Mapping[str, ir.TensorProtocol]],
) -> ir.Model:
    """A copy of the traced graph whose NMLinear nodes are complete, with their function bodies.

    Args:
        traced: Graph with one bare NMLinear node for every layer; stays as it is.
        layers: The layers by name.
        constants: Tensors of one layer by the contract's input names (`W`, `bias`, ...); those
            absent are left out of its node.

    Raises:
        InternalError: if nodes and layers do not belong together.
    """
    model = traced.clone()
    nodes = _linear_nodes(model, layers)
    for name, node in nodes.items():
        _attach_constants(model.graph, node, name, constants(name))
        _attach_attributes(node, layers[name])
    model.graph.opset_imports[op_contract().domain] = op_contract().opset_version
    _add_functions(model, list(nodes.values()))
    return model


def assemble_dense(
    traced: ir.Model, layers: Mapping[str, LayerSpec], weights: Callable[[str], DenseWeights]
) -> ir.Model:
    """A copy of the traced graph with `MatMul`, and `Add` where there is a bias.

    Args:
        traced: Graph with one bare NMLinear node for every layer; stays as it is.
        layers: The layers by name.
        weights: The original weights of one layer.

    Raises:
        InternalError: if nodes and layers do not belong together.
    """
    model = traced.clone()
    for name, node in _linear_nodes(model, layers).items():
        _replace_by_matmul(model.graph, node, name, weights(name))
    model.graph.opset_imports.pop(op_contract().domain, None)
    model.ir_version = IR_VERSION
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write `path` and its weights to `<path>.data`, one tensor at a time."""
    ir.save(
        model,
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=_EXTERNAL_FROM,
        alignment=ALIGNMENT,
        align_threshold=_ALIGN_FROM,
        max_workers=1,
    )


def _linear_nodes(model: ir.Model, layers: Mapping[str, LayerSpec]) -> dict[str, ir.Node]:
    """The bare NMLinear nodes by layer name, in graph order."""
    nodes = dict(_named_linears(model))
    count = sum(1 for node in model.graph if node.op_type == LINEAR)
    if count != len(nodes) or nodes.keys() != layers.keys():
        missing = sorted(layers.keys() - nodes.keys())
        raise InternalError(
            f"The traced graph has {count} NMLinear nodes for {len(layers)} layers; "
            f"without a node: {', '.join(missing) or 'none'}."
        )
    return nodes


def _named_linears(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    for node in model.graph:
        if node.op_type == LINEAR and node.domain == op_contract().domain:
            yield node.attributes[LAYER_ATTRIBUTE].as_string(), node


def _attach_constants(
    graph: ir.Graph, node: ir.Node, name: str, tensors: Mapping[str, ir.TensorProtocol]
) -> None:
    """Give the node its inputs in contract order, trailing absent ones left out."""
    known = [spec.name for spec in op_contract().ops[LINEAR].inputs[1:]]
    unknown = sorted(tensors.keys() - set(known))
    if unknown:
        raise InternalError(f"Layer {name} has constants that no input takes: {unknown}.")
    while known and known[-1] not in tensors:
        known.pop()
    node.resize_inputs(1 + len(known))
    for index, key in enumerate(known, start=1):
        if key in tensors:
            node.replace_input_with(index, _initializer(graph, f"{name}.{key}", tensors[key]))


def _attach_attributes(node: ir.Node, layer: LayerSpec) -> None:
    del node.attributes[LAYER_ATTRIBUTE]
    node.name = layer.name
    for attribute in (
        ir.AttrInt64("n", layer.nm.n),
        ir.AttrInt64("m", layer.nm.m),
        ir.AttrInt64("dynamic_shift", int(layer.dynamic_shift)),
        ir.AttrInt64("variance_correction", int(layer.variance_correction)),
        ir.AttrString("phase", layer.phase),
    ):
        node.attributes.add(attribute)


def _add_functions(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Add a body for every signature among the nodes, and tell each node which is its own."""
    protos = [ir.serde.serialize_node(node) for node in nodes]
    for proto in function_protos_for(protos, opset=model.graph.opset_imports[""]):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    for node, proto in zip(nodes, protos, strict=True):
        node.overload = proto.overload
    model.ir_version = IR_VERSION


def _replace_by_matmul(graph: ir.Graph, node: ir.Node, name: str, weights: DenseWeights) -> None:
    weight = _initializer(graph, f"{name}.W", weights.weight)
    product = ir.Node("", "MatMul", [node.inputs[0], weight], name=name)
    nodes = [product]
    if weights.bias is not None:
        bias = _initializer(graph, f"{name}.bias", weights.bias)
        nodes.append(ir.Node("", "Add", [product.outputs[0], bias], name=f"{name}.add_bias"))
        product.outputs[0].name = f"{name}.product"
        product.outputs[0].shape, product.outputs[0].type = (
            node.outputs[0].shape,
            node.outputs[0].type,
        )
    result = nodes[-1].outputs[0]
    old = node.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [result])


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(list(tensor.shape.numpy())),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
