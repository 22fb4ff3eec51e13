"""Constants of a graph."""

from __future__ import annotations

import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Put a constant into a graph under a name that it does not have yet."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(list(tensor.shape.numpy())),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
