"""Checks an exported file before anybody may run it.

Everything here is our own doing: a failure is a bug, not the user's fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

from nmexport.errors import ArtifactError, InternalError
from nmexport.graph.assembly import ALIGNMENT, LINEAR
from nmexport.graph.contract import check_node, op_contract
from nmexport.graph.linears import PlacedLinear, fused_name, linears_of_node, placed_linears
from nmexport.graph.type_check import check_types

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from nmexport.store.layers import LayerSpec

_TOKEN_INPUTS: Mapping[str, tuple[str, str]] = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
}
_STATES = (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))


def check_sparse(path: Path, layers: Mapping[str, LayerSpec]) -> None:
    """Check the sparse model: a node of ours for every layer, within the contract.

    Raises:
        InternalError: at the first thing that does not hold.
    """
    model = _load_checked(path)
    nodes = [node for node in model.graph.node if node.op_type == LINEAR]
    _check_every_linear(path, nodes, layers)
    placed = _check_placed(path, model.graph, LINEAR, op_contract().domain)
    constants = {item.name: item for item in model.graph.initializer}
    shapes = {name: tuple(item.dims) for name, item in constants.items()}
    for node in nodes:
        try:
            check_node(node)
        except ArtifactError as error:
            raise InternalError(f"{path}: {error}") from error
        _check_weight(path, node, [layers[name] for name in linears_of_node(node)], shapes)
        _check_constants(path, node, constants)
    _check_columns(path, model.graph, placed, layers)
    _check_functions(path, model, nodes)
    check_types(path, model)


def check_dense(path: Path, layers: Mapping[str, LayerSpec]) -> None:
    """Check the dense baseline: standard ops alone, a `MatMul` for every layer.

    Raises:
        InternalError: at the first thing that does not hold.
    """
    model = _load_checked(path)
    named = _check_placed(path, model.graph, "MatMul", "")
    foreign = sorted({node.domain for node in model.graph.node} - {""})
    missing = sorted(layers.keys() - named.keys())
    if foreign or missing or model.functions:
        raise InternalError(
            f"{path} should be standard ONNX with a MatMul for every linear; foreign domains: "
            f"{foreign}; linears without one: {missing[:3]}."
        )
    check_types(path, model)


def _check_every_linear(
    path: Path, nodes: Sequence[onnx.NodeProto], layers: Mapping[str, LayerSpec]
) -> None:
    """Check that nodes stand for the layers, each for its own ones, none twice."""
    names = sorted(name for node in nodes for name in linears_of_node(node))
    named = all(node.name == fused_name(linears_of_node(node)) for node in nodes)
    if names != sorted(layers) or not named:
        raise InternalError(
            f"{path} has {len(nodes)} {LINEAR} nodes that do not stand for the {len(layers)} "
            "sparsified linears one by one."
        )


def _check_placed(
    path: Path, graph: onnx.GraphProto, op_type: str, domain: str
) -> dict[str, PlacedLinear]:
    try:
        return placed_linears(graph, op_type, domain=domain)
    except ArtifactError as error:
        raise InternalError(f"{path}: {error}") from error


def _check_columns(
    path: Path,
    graph: onnx.GraphProto,
    placed: Mapping[str, PlacedLinear],
    layers: Mapping[str, LayerSpec],
) -> None:
    """Check that a Split behind a fused node gives each linear as many columns as outputs."""
    constants = {item.name: item for item in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for linear in placed.values():
        split = makers[linear.output]
        if split is linear.node:
            continue
        sizes = onnx.numpy_helper.to_array(constants[split.input[1]]).tolist()
        wanted = [layers[name].out_features for name in linears_of_node(linear.node)]
        if sizes != wanted:
            raise InternalError(
                f"{path}: {linear.node.name} is cut into {sizes} columns, not {wanted}."
            )


def _load_checked(path: Path) -> onnx.ModelProto:
    """Load the graph without its weights, after the checks that both models share."""
    try:
        onnx.checker.check_model(str(path))  # by path: the only way for models over 2 GiB
    except onnx.checker.ValidationError as error:
        raise InternalError(f"{path} fails the ONNX checker: {error}") from error
    model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    _check_nothing_dangles(path, model.graph)
    _check_data_file(path, model.graph)
    _check_interface(path, model.graph)
    return model


def _check_nothing_dangles(path: Path, graph: onnx.GraphProto) -> None:
    """Check that every initializer is read, every constant an initializer, every result used."""
    read = {name for node in graph.node for name in node.input if name}
    outputs = {item.name for item in graph.output}
    unread = sorted({item.name for item in graph.initializer} - read - outputs)
    constants = [node.name for node in graph.node if node.op_type == "Constant"]
    idle = [node.name for node in graph.node if not {*node.output} & (read | outputs)]
    if unread or constants or idle:
        raise InternalError(
            f"{path} has parts without use: initializers {unread[:3]}, "
            f"constant nodes {constants[:3]}, nodes {idle[:3]}."
        )


def _check_data_file(path: Path, graph: onnx.GraphProto) -> None:
    """Check that the data file holds what initializers point at and, padding apart, no more."""
    regions = sorted(_regions(graph))
    size = path.with_name(f"{path.name}.data").stat().st_size if regions else 0
    ends = [0, *(offset + length for offset, length in regions)]
    gaps = [offset - end for (offset, _), end in zip(regions, ends, strict=False)]
    if ends[-1] != size or any(not 0 <= gap < ALIGNMENT for gap in gaps):
        raise InternalError(f"{path}.data holds bytes that no initializer of the model reads.")


def _regions(graph: onnx.GraphProto) -> Iterator[tuple[int, int]]:
    for item in graph.initializer:
        if item.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in item.external_data}
            yield int(entries.get("offset", 0)), int(entries["length"])


def _check_interface(path: Path, graph: onnx.GraphProto) -> None:
    """Check that inputs, outputs and axes have the names that clients expect."""
    inputs = {item.name: _axes(item) for item in graph.input}
    outputs = {item.name: _axes(item) for item in graph.output}
    if any(inputs.get(name) != axes for name, axes in _TOKEN_INPUTS.items()):
        raise InternalError(f"{path} has inputs {inputs}; expected {dict(_TOKEN_INPUTS)}.")
    if list(outputs)[:1] != ["logits"] or outputs["logits"][:2] != _TOKEN_INPUTS["input_ids"]:
        raise InternalError(f"{path} has outputs {list(outputs)[:2]}; the first must be logits.")
    for (prefix, length), values in zip(_STATES, (inputs, outputs), strict=True):
        states = [name for name in values if name not in {*_TOKEN_INPUTS, "logits"}]
        expected = [
            f"{prefix}.{i}.{kind}" for i in range(len(states) // 2) for kind in ("key", "value")
        ]
        axes = {(values[name][0], values[name][2]) for name in states}
        if states != expected or axes != {("batch_size", length)}:
            raise InternalError(f"{path} has states {states[:4]} with axes {axes}.")


def _axes(item: onnx.ValueInfoProto) -> tuple[str | int, ...]:
    return tuple(size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim)


def _check_weight(
    path: Path,
    node: onnx.NodeProto,
    members: Sequence[LayerSpec],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that the node reads its own folded weight `[K, O]`, and the dense one is gone."""
    if node.input[1] != f"{node.name}.W":
        raise InternalError(f"{path}: {node.name} reads {node.input[1]}, not its own weight.")
    columns = sum(layer.out_features for layer in members)
    if shapes.get(node.input[1]) != (members[0].in_features, columns):
        raise InternalError(
            f"{path}: the weight of {node.name} has shape {shapes.get(node.input[1])}."
        )
    left = [layer.name for layer in members if f"{layer.name}.weight" in shapes]
    if left:
        raise InternalError(f"{path}: the dense weight of {left[0]} was left behind.")


def _check_constants(
    path: Path, node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]
) -> None:
    """Check that inputs other than X are constants of the model, and its order a permutation.

    GPU kernels read shifts, scales and orders before the kernel ahead of them has ended, and rows
    of W where the order says; TensorRT does not let a plugin check either.
    """
    made = sorted({name for name in node.input[1:] if name} - constants.keys())
    if made:
        raise InternalError(f"{path}: {node.name} reads {made[0]}, which is no initializer.")
    names = [spec.name for spec in op_contract().ops[LINEAR].inputs]
    name = dict(zip(names, node.input, strict=False)).get("channel_order")
    if not name:
        return
    order = onnx.numpy_helper.to_array(constants[name], str(path.parent))
    if not np.array_equal(np.sort(order), np.arange(order.size)):
        raise InternalError(f"{path}: {name} is no permutation of 0 to {order.size - 1}.")


def _check_functions(path: Path, model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Check that every node of ours has its function body, and every body a node."""
    domain = op_contract().domain
    bodies = {(item.name, item.overload) for item in model.functions if item.domain == domain}
    called = {(node.op_type, node.overload) for node in nodes}
    inner = {
        (node.op_type, node.overload)
        for function in model.functions
        for node in function.node
        if node.domain == domain
    }
    if called - bodies or bodies - called - inner:
        raise InternalError(f"{path}: function bodies {sorted(bodies)} for nodes {sorted(called)}.")
