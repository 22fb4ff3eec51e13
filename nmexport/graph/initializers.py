"""Constants of a graph."""

from __future__ import annotations

import numpy as np
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


def add_constant(graph: ir.Graph, name: str, value: int | list[int]) -> ir.Value:
    """Add an int64 initializer, once a name."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(value, dtype=np.int64), name=name)
        add_initializer(graph, name, tensor)
    return graph.initializers[name]
