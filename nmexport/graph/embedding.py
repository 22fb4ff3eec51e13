"""The input embedding in integers: rows of 8 bits, with a scale a row or a group of columns.

    ids ──► Gather values ──► Cast ──► Mul ──►      in place of      ids ──► Gather table ──►
       └──► Gather scale ──────────────┘

Standard operators alone: a token reads its row and its scales. With groups, values are reshaped to
`[..., G, H / G]` before the product, and back after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from nmexport.errors import InternalError
from nmexport.graph.initializers import add_initializer
from nmexport.graph.matching import int_attribute, is_op

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


@dataclass(frozen=True)
class StoredRows:
    """An embedding whose rows are rounded."""

    values: ir.TensorProtocol
    """`[V, H]` int8."""
    scale: ir.TensorProtocol
    """`[V, G]`, T or float32: products are computed in this type."""


def store_embedding(model: ir.Model, names: Collection[str], rows: StoredRows) -> None:
    """Let a model look tokens up in rounded rows, in place.

    Args:
        model: A graph that gathers rows of one of the initializers.
        names: What the embedding may be called: a tied one has several names.
        rows: What takes its place.

    Raises:
        InternalError: if nothing gathers its rows.
    """
    graph = model.graph
    gathers = [
        node
        for node in graph
        if is_op(node, "Gather")
        and node.inputs[0] is not None
        and node.inputs[0].name in names
        and int_attribute(node, "axis", 0) == 0
    ]
    if not gathers:
        raise InternalError(f"No Gather reads an embedding {sorted(names)}.")
    tables = {node.inputs[0].name: node.inputs[0] for node in gathers if node.inputs[0]}
    title = min(name for name in tables if name)
    values = add_initializer(graph, f"{title}.values", rows.values)
    scale = add_initializer(graph, f"{title}.scale", rows.scale)
    for node in gathers:
        _replace(graph, node, values, scale)
    for name, table in tables.items():
        if name and not table.uses():
            graph.initializers.pop(name)


def _replace(graph: ir.Graph, node: ir.Node, values: ir.Value, scale: ir.Value) -> None:
    old = node.outputs[0]
    groups = (scale.const_value.shape.numpy() if scale.const_value else (1, 1))[1]
    picked = ir.node("Gather", [values, node.inputs[1]], {"axis": 0}, name=f"{old.name}.values")
    wide = ir.node("Cast", [picked.outputs[0]], {"to": scale.dtype}, name=f"{old.name}.wide")
    step = ir.node("Gather", [scale, node.inputs[1]], {"axis": 0}, name=f"{old.name}.scale")
    nodes = [picked, wide, step]
    if groups == 1:
        nodes.append(_node("Mul", [wide, step], f"{old.name}.embedded"))
    else:
        rank = len(old.shape or (0, 0, 0))
        split = _integers(graph, [*[0] * (rank - 1), groups, -1], f"{old.name}.groups")
        joined = _integers(graph, [*[0] * (rank - 1), -1], f"{old.name}.row")
        last = _integers(graph, [-1], f"{old.name}.last")
        grouped = _node("Reshape", [wide, split], f"{old.name}.grouped")
        steps = _node("Unsqueeze", [step, last], f"{old.name}.steps")
        product = _node("Mul", [grouped, steps], f"{old.name}.product")
        row = _node("Reshape", [product, joined], f"{old.name}.embedded")
        nodes += [grouped, steps, product, row]
    if scale.dtype != old.dtype:
        nodes.append(
            ir.node("Cast", [nodes[-1].outputs[0]], {"to": old.dtype}, name=f"{old.name}.narrow")
        )
    for part in nodes:
        part.outputs[0].name = f"{part.name}.result"
    nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], nodes, [old], [nodes[-1].outputs[0]]
    )


def _node(kind: str, inputs: Sequence[ir.Node | ir.Value], name: str) -> ir.Node:
    values = [part.outputs[0] if isinstance(part, ir.Node) else part for part in inputs]
    return ir.node(kind, values, name=name)


def _integers(graph: ir.Graph, values: Sequence[int], name: str) -> ir.Value:
    return add_initializer(graph, name, ir.tensor(np.asarray(values, np.int64), name=name))
