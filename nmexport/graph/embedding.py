"""The input embedding in integers: rows of 8 bits, each with a scale of its own.

    ids ──► Gather values ──► Cast ──► Mul ──►      in place of      ids ──► Gather table ──►
       └──► Gather scale ──────────────┘

Standard operators alone: a token reads its row and one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from nmexport.errors import InternalError
from nmexport.graph.initializers import add_initializer
from nmexport.graph.matching import int_attribute, is_op

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True)
class StoredRows:
    """An embedding whose rows are rounded."""

    values: ir.TensorProtocol
    """`[V, H]` int8."""
    scale: ir.TensorProtocol
    """`[V, 1]` T."""


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
    picked = ir.node("Gather", [values, node.inputs[1]], {"axis": 0}, name=f"{old.name}.values")
    wide = ir.node("Cast", [picked.outputs[0]], {"to": scale.dtype}, name=f"{old.name}.wide")
    step = ir.node("Gather", [scale, node.inputs[1]], {"axis": 0}, name=f"{old.name}.scale")
    made = ir.node("Mul", [wide.outputs[0], step.outputs[0]], name=f"{old.name}.embedded")
    for part in (picked, wide, step, made):
        part.outputs[0].name = f"{part.name}.result"
    wide.outputs[0].shape = made.outputs[0].shape = old.shape
    made.outputs[0].type = wide.outputs[0].type = old.type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [picked, wide, step, made], [old], [made.outputs[0]]
    )
