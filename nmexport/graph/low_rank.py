"""The low-rank product next to an NMLinear node (R-Sparse): `(z @ A) @ B` in standard ONNX ops.

    x ──► NMLinear ──────────────► Add ──► the linear's output
    └───► (Sub shift) ► MatMul A ► MatMul B ┘

The op holds `W - A B`, so what it keeps and what it drops meet the low-rank part alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from nmexport.errors import InternalError
from nmexport.graph.initializers import add_initializer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FACTORS = ("remainder_in", "remainder_out")
"""Tensors of a folded layer that no input of the op takes: A `[K, r]`, B `[r, O]`."""


def without_factors(tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, ir.TensorProtocol]:
    """Drop the factors; return the tensors that the op takes."""
    return {kind: tensor for kind, tensor in tensors.items() if kind not in FACTORS}


def add_remainder(
    graph: ir.Graph,
    node: ir.Node,
    name: str,
    tensors: Mapping[str, ir.TensorProtocol],
    *,
    dynamic_shift: bool,
) -> None:
    """Put the product next to a bare NMLinear node; nothing where the layer has no factors.

    Args:
        graph: Changed in place.
        node: The layer's node; what read its output reads the sum afterwards.
        name: Of the layer; names of new nodes start with it.
        tensors: Of the folded layer, by kind.
        dynamic_shift: Whether z is x minus its own mean.
    """
    if FACTORS[0] not in tensors:
        return
    old, x = node.outputs[0], node.inputs[0]
    if x is None:
        raise InternalError(f"The node of {name} has no input.")
    readers = list(old.uses())
    shifted = _shift(graph, x, name, tensors, dynamic_shift=dynamic_shift)
    inner = _product(graph, shifted[-1].outputs[0] if shifted else x, f"{name}.remainder_in",
                     tensors[FACTORS[0]])  # fmt: skip
    outer = _product(graph, inner.outputs[0], f"{name}.remainder_out", tensors[FACTORS[1]])
    total = ir.Node("", "Add", [old, outer.outputs[0]], name=f"{name}.add_remainder")
    total.outputs[0].name = f"{name}.with_remainder"
    total.outputs[0].type, total.outputs[0].shape = old.type, old.shape
    for reader, place in readers:
        reader.replace_input_with(place, total.outputs[0])
    graph.insert_after(node, [*shifted, inner, outer, total])


def _shift(
    graph: ir.Graph,
    x: ir.Value,
    name: str,
    tensors: Mapping[str, ir.TensorProtocol],
    *,
    dynamic_shift: bool,
) -> list[ir.Node]:
    """Make the nodes that compute z from x; none where they are the same."""
    if dynamic_shift:
        axes = add_initializer(graph, f"{name}.remainder_axes", ir.tensor(np.array([-1])))
        mean = ir.Node("", "ReduceMean", [x, axes], [ir.AttrInt64("keepdims", 1)])
        mean.name = f"{name}.remainder_mean"
        centred = ir.Node("", "Sub", [x, mean.outputs[0]], name=f"{name}.remainder_centred")
        return [mean, centred]
    if "shift" not in tensors:
        return []
    dtype = tensors[FACTORS[0]].dtype
    shift = _in_own_order(tensors["shift"].numpy(), tensors).astype(dtype.numpy())
    value = add_initializer(graph, f"{name}.remainder_shift", ir.Tensor(shift, dtype=dtype))
    return [ir.Node("", "Sub", [x, value], name=f"{name}.remainder_centred")]


def _in_own_order(
    shift: NDArray[np.float32], tensors: Mapping[str, ir.TensorProtocol]
) -> NDArray[np.float32]:
    """Put a per-channel shift back into natural order, in which the product reads X."""
    if "channel_order" not in tensors or shift.size == 1:
        return shift
    own = np.empty_like(shift)
    own[tensors["channel_order"].numpy()] = shift
    return own


def _product(graph: ir.Graph, x: ir.Value, name: str, factor: ir.TensorProtocol) -> ir.Node:
    return ir.Node("", "MatMul", [x, add_initializer(graph, name, factor)], name=f"{name}.product")
