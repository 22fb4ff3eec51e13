"""From one traced graph to two models: sparse with our op, dense with `MatMul`.

Both have the same nodes but for the linears, so a comparison of the two compares the linears.

Linears that read the same value (q, k and v; gate and up) become one node over their columns side
by side: the sparse one selects once and reads longer rows. They are fused only where they select
alike: equal pattern, phase, corrections, shift, score scale, channel order and value scale; and
stored alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from nmexport.errors import InternalError
from nmexport.graph.contract import op_contract
from nmexport.graph.functions import function_protos_for
from nmexport.graph.initializers import add_initializer
from nmexport.graph.linears import LINEARS, fused_name
from nmexport.graph.low_rank import add_remainder, without_factors
from nmexport.graph.matching import static_size
from nmexport.graph.versions import IR_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
    from pathlib import Path

    from nmexport.store.layers import LayerSpec

LAYER_ATTRIBUTE = "layer"
"""Attribute of a traced NMLinear node that holds the dotted name of its linear."""

LINEAR = "NMLinear"

CHANNEL_INPUTS = ("shift", "score_scale", "channel_order", "value_scale", "dense_scale")
"""Constants along K next to W: linears of one node share them."""

_DENSE_COLUMNS_PER_CHANNEL = 4
"""Up to this many columns a channel, fused MatMuls are faster: beyond, a prompt pays more for the
Split's copy than a token gains (measured: q/k/v yes, gate/up no)."""

# Constants whose last axis is O.
_COLUMN_INPUTS = (
    "W",
    "bias",
    "shift_weight",
    "weight_scale",
    "weight_zero_point",
    "dense_bias",
)

ALIGNMENT = 4096  # bytes: a page, so that a runtime can map a weight as it lies in the file
_ALIGN_FROM = 16384  # bytes: below this, padding would outweigh the constant
_EXTERNAL_FROM = 1024  # bytes: shapes and scalars stay readable in the model file itself


@dataclass(frozen=True)
class DenseWeights:
    """Weight and bias of a dense linear `x @ weight + bias`."""

    weight: ir.TensorProtocol
    """`[K, O]`."""
    bias: ir.TensorProtocol | None
    """`[O]`."""
    tied: str | None = None
    """Initializer of the graph that holds the weight already, as `[O, K]`: a tied embedding."""


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
    bare = _linear_nodes(model, layers)
    tensors = {name: constants(name) for name in bare}
    for name, node in bare.items():
        dynamic = layers[name].dynamic_shift
        add_remainder(model.graph, node, name, tensors[name], dynamic_shift=dynamic)
    tensors = {name: without_factors(group) for name, group in tensors.items()}
    nodes = []
    for site in _sites(bare, lambda name: _selection_key(layers[name], tensors[name])):
        node = _merge(model.graph, [bare[name] for name in site], site)
        title = fused_name(site)
        _attach_constants(model.graph, node, title, _side_by_side([tensors[name] for name in site]))
        _attach_attributes(node, title, layers[site[0]])
        nodes.append(node)
    model.graph.opset_imports[op_contract().domain] = op_contract().opset_version
    _add_functions(model, nodes)
    return model


def assemble_dense(
    traced: ir.Model,
    layers: Mapping[str, LayerSpec],
    weights: Callable[[str], DenseWeights],
) -> ir.Model:
    """A copy of the traced graph with `MatMul`, and `Add` where there is a bias.

    Linears that share an input are fused here too, where that makes the baseline faster.

    Args:
        traced: Graph with one bare NMLinear node for every layer; stays as it is.
        layers: The layers by name.
        weights: The original weights of one layer.

    Raises:
        InternalError: if nodes and layers do not belong together.
    """
    model = traced.clone()
    bare = _linear_nodes(model, layers)
    for site in _dense_sites(bare, layers):
        node = _merge(model.graph, [bare[name] for name in site], site)
        parts = [weights(name) for name in site]
        tied = model.graph.initializers.get(parts[0].tied or "")
        columns = _side_by_side(
            [
                {"W": part.weight, **({} if part.bias is None else {"bias": part.bias})}
                for part in parts
            ]
        )
        _replace_by_matmul(model.graph, node, fused_name(site), columns, tied=tied)
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
    nodes = dict(find_linears(model))
    count = sum(1 for node in model.graph if node.op_type == LINEAR)
    if count != len(nodes) or nodes.keys() != layers.keys():
        missing = sorted(layers.keys() - nodes.keys())
        raise InternalError(
            f"The traced graph has {count} NMLinear nodes for {len(layers)} layers; "
            f"without a node: {', '.join(missing) or 'none'}."
        )
    return nodes


def find_linears(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Yield the bare NMLinear nodes with the names of their layers, in graph order."""
    for node in model.graph:
        if node.op_type == LINEAR and node.domain == op_contract().domain:
            yield node.attributes[LAYER_ATTRIBUTE].as_string(), node


def _sites(nodes: Mapping[str, ir.Node], key: Callable[[str], Hashable]) -> list[tuple[str, ...]]:
    """Names of linears that become one node, by input and key, in graph order."""
    sites: dict[Hashable, list[str]] = {}
    for name, node in nodes.items():
        sites.setdefault((id(node.inputs[0]), key(name)), []).append(name)
    return [tuple(names) for names in sites.values()]


def _dense_sites(
    nodes: Mapping[str, ir.Node], layers: Mapping[str, LayerSpec]
) -> list[tuple[str, ...]]:
    """The sites that a MatMul gains by; of the others, each linear alone."""
    chosen: list[tuple[str, ...]] = []
    for site in _sites(nodes, lambda _: None):
        columns = sum(layers[name].out_features for name in site)
        whole = columns <= _DENSE_COLUMNS_PER_CHANNEL * layers[site[0]].in_features
        chosen += [site] if whole else [(name,) for name in site]
    return chosen


def _selection_key(layer: LayerSpec, tensors: Mapping[str, ir.TensorProtocol]) -> Hashable:
    """Equal for layers that keep the same channels of the same input and correct them alike."""
    constants = tuple(
        (name, hashlib.sha256(tensors[name].tobytes()).digest())
        for name in CHANNEL_INPUTS
        if name in tensors
    )
    flags = (layer.pattern, layer.phase, layer.dynamic_shift, layer.variance_correction)
    stored = (layer.weight_type, layer.activation_bits, layer.activation_block)
    scales = tuple(
        (name, tuple(tensors[name].shape.numpy())[:-1], tensors[name].dtype)
        for name in ("weight_scale", "weight_zero_point")
        if name in tensors
    )
    return (*flags, *stored, scales, constants)


def _merge(graph: ir.Graph, nodes: Sequence[ir.Node], names: Sequence[str]) -> ir.Node:
    """One bare node in place of several with the same input, and the Split behind it."""
    if len(nodes) == 1:
        return nodes[0]
    title = fused_name(names)
    first = nodes[0]
    merged = ir.Node(first.domain, first.op_type, [first.inputs[0]], name=title)
    merged.metadata_props[LINEARS] = "\n".join(names)
    shapes = [list(node.outputs[0].shape or ()) for node in nodes]
    sizes = [static_size(node.outputs[0], -1) or 0 for node in nodes]
    product = merged.outputs[0]
    product.name = f"{title}.product"
    product.type = first.outputs[0].type
    product.shape = ir.Shape([*shapes[0][:-1], sum(sizes)])
    split = ir.Node(
        "",
        "Split",
        [product, _split_sizes(graph, sizes)],
        [ir.AttrInt64("axis", -1)],
        num_outputs=len(nodes),
        name=f"{title}.split",
    )
    old = [node.outputs[0] for node in nodes]
    ir.convenience.replace_nodes_and_values(
        graph, first, nodes, [merged, split], old, split.outputs
    )
    return merged


def _split_sizes(graph: ir.Graph, sizes: Sequence[int]) -> ir.Value:
    """The constant that says where to cut; one for all nodes of the same sizes."""
    name = "split_sizes_" + "_".join(str(size) for size in sizes)
    known = graph.initializers.get(name)
    return known or add_initializer(graph, name, ir.tensor(np.asarray(sizes, np.int64), name=name))


def _side_by_side(
    parts: Sequence[Mapping[str, ir.TensorProtocol]],
) -> dict[str, ir.TensorProtocol]:
    """Constants of one node from those of linears that select alike.

    A bias that only some of them have is zero for the others.
    """
    if len(parts) == 1:
        return dict(parts[0])
    kinds = {kind for part in parts for kind in part}
    merged = {kind: parts[0][kind] for kind in kinds - {*_COLUMN_INPUTS}}
    for kind in _COLUMN_INPUTS:
        if kind in kinds:
            given = next(part[kind] for part in parts if kind in part)
            merged[kind] = _join([part.get(kind) or _zeros(part["W"], given) for part in parts])
    return merged


def _zeros(weight: ir.TensorProtocol, like: ir.TensorProtocol) -> ir.TensorProtocol:
    """The bias of a linear that has none next to one that has."""
    return ir.Tensor(np.zeros(weight.shape.numpy()[-1:], like.dtype.numpy()), dtype=like.dtype)


def _join(tensors: Sequence[ir.TensorProtocol]) -> ir.LazyTensor:
    """Tensors joined along their last axis when they are written, not before."""
    first = tensors[0]
    columns = sum(tensor.shape.numpy()[-1] for tensor in tensors)

    def read() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors]
        return ir.Tensor(np.concatenate(arrays, axis=-1), dtype=first.dtype)

    return ir.LazyTensor(
        read, dtype=first.dtype, shape=ir.Shape([*first.shape.numpy()[:-1], columns])
    )


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
            node.replace_input_with(index, add_initializer(graph, f"{name}.{key}", tensors[key]))


def _attach_attributes(node: ir.Node, title: str, layer: LayerSpec) -> None:
    node.attributes.pop(LAYER_ATTRIBUTE, None)
    node.name = title
    for attribute in (
        ir.AttrInt64("n", layer.pattern.n),
        ir.AttrInt64("m", layer.pattern.m),
        ir.AttrInt64("dynamic_shift", int(layer.dynamic_shift)),
        ir.AttrInt64("variance_correction", int(layer.variance_correction)),
        ir.AttrString("phase", layer.phase),
    ):
        node.attributes.add(attribute)
    if layer.activation_bits:
        node.attributes.add(ir.AttrInt64("activation_bits", layer.activation_bits))
        node.attributes.add(ir.AttrInt64("activation_block", layer.activation_block))


def _add_functions(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Add a body for every signature among the nodes, and tell each node which is its own."""
    protos = [ir.serde.serialize_node(node) for node in nodes]
    for proto in function_protos_for(protos, opset=model.graph.opset_imports[""]):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    for node, proto in zip(nodes, protos, strict=True):
        node.overload = proto.overload
    model.ir_version = IR_VERSION


def _replace_by_matmul(
    graph: ir.Graph,
    node: ir.Node,
    name: str,
    tensors: Mapping[str, ir.TensorProtocol],
    *,
    tied: ir.Value | None,
) -> None:
    nodes = []
    if tied is None:
        weight = add_initializer(graph, f"{name}.W", tensors["W"])
    else:
        turned = ir.node("Transpose", [tied], {"perm": [1, 0]}, name=f"{name}.turned")
        weight = turned.outputs[0]
        weight.name, weight.type = f"{name}.W", ir.TensorType(tensors["W"].dtype)
        weight.shape = ir.Shape(list(tensors["W"].shape.numpy()))
        nodes.append(turned)
    product = ir.Node("", "MatMul", [node.inputs[0], weight], name=name)
    product.metadata_props.update(node.metadata_props)
    nodes.append(product)
    old = node.outputs[0]
    if "bias" in tensors:
        bias = add_initializer(graph, f"{name}.bias", tensors["bias"])
        nodes.append(ir.Node("", "Add", [product.outputs[0], bias], name=f"{name}.add_bias"))
        product.outputs[0].name = f"{name}.unbiased"
        product.outputs[0].shape, product.outputs[0].type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], nodes, [old], [nodes[-1].outputs[0]]
    )
