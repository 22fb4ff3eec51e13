"""Infers types strictly over an exported file, in function bodies too.

A model's layers are alike, and inlining every body of every layer takes a minute. So bodies are
looked at once for each kind of node: what it does, and the types of what it reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import TensorProto, helper

from nmexport.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def check_types(path: Path, model: onnx.ModelProto) -> None:
    """Infer every value's type strictly, in function bodies too: ours and the standard's.

    A runtime that has no kernel for a standard operator in some type runs the operator's own
    function body, so that has to be well typed as well.

    Args:
        path: Where the model lies, for the error.
        model: Without its external data.

    Raises:
        InternalError: at the first type that does not hold.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        bodies = onnx.inliner.inline_selected_functions(
            one_of_each_kind(inferred), [], exclude=True, inline_schema_functions=True
        )
        onnx.shape_inference.infer_shapes(bodies, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise InternalError(f"{path} is not well typed: {error}") from error


def one_of_each_kind(model: onnx.ModelProto) -> onnx.ModelProto:
    """Build a model of one node of each kind, in the order of the first of them.

    What a node reads and none of these makes is an input of the new model, of the type it had.
    Constants that lie in the model's own file keep their values: shapes follow from them.

    Args:
        model: With the type of every value, as inference leaves it.
    """
    graph = model.graph
    constants = {item.name: item for item in graph.initializer if _is_here(item)}
    types = {item.name: item.type for item in (*graph.input, *graph.output, *graph.value_info)} | {
        item.name: helper.make_tensor_type_proto(item.data_type, list(item.dims))
        for item in graph.initializer
    }
    first: dict[tuple[object, ...], onnx.NodeProto] = {}
    for node in graph.node:
        first.setdefault(_kind_of(node, types, constants), node)
    nodes = list(first.values())
    read = dict.fromkeys(name for node in nodes for name in _read_by(node))
    made = {name: None for node in nodes for name in node.output if name}
    inputs = [name for name in read if name in types and name not in made | constants]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "kinds",
            [helper.make_value_info(name, types[name]) for name in inputs],
            [helper.make_value_info(name, types[name]) for name in made if name in types],
            [constants[name] for name in read if name in constants],
            # The inliner looks for types here alone.
            value_info=[helper.make_value_info(n, types[n]) for n in read if n in constants],
        ),
        functions=model.functions,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def _is_here(item: TensorProto) -> bool:
    return item.data_location != TensorProto.EXTERNAL


def _kind_of(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    constants: Mapping[str, TensorProto],
) -> tuple[object, ...]:
    """Make a key that is equal for nodes of one op, equal attributes and equal input types."""
    attributes = tuple(sorted(item.SerializeToString() for item in node.attribute))
    reads = tuple(
        _content(constants[name]) if name in constants else _shape(types.get(name))
        for name in _read_by(node)
    )
    return node.domain, node.op_type, node.overload, len(node.output), attributes, reads


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """List the names that a node reads, in its subgraphs too; a missing input is empty."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)


def _content(item: TensorProto) -> tuple[object, ...]:
    nameless = TensorProto()
    nameless.CopyFrom(item)
    nameless.ClearField("name")
    return ("constant", nameless.SerializeToString())


def _shape(kind: onnx.TypeProto | None) -> tuple[object, ...]:
    """Strip a type of the size names that inference makes up, different in every layer."""
    if kind is None or not kind.HasField("tensor_type"):
        return (kind and kind.SerializeToString(),)
    sizes = (
        dim.dim_value if dim.HasField("dim_value") else "" for dim in kind.tensor_type.shape.dim
    )
    return kind.tensor_type.elem_type, kind.tensor_type.HasField("shape"), *sizes
