"""Replaces nodes by another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence


def take_place(
    graph: ir.Graph,
    old: list[ir.Node],
    new: ir.Node,
    outputs: Sequence[ir.Value],
    *,
    at: ir.Node | None = None,
) -> None:
    """Put `new` where the first of `old` is, or `at`; its outputs take names, shapes and uses."""
    fresh = list(new.outputs)[: len(outputs)]
    for before, after in zip(outputs, fresh, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(graph, at or old[0], old, [new], list(outputs), fresh)


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let every user of `old` read `new`."""
    for usage in list(old.uses()):
        usage.node.replace_input_with(usage.idx, new)


def replace_node(graph: ir.Graph, node: ir.Node, new: ir.Node) -> None:
    """Replace a node of one output by another, under its name."""
    graph.insert_before(node, new)
    new.name = node.name
    take_over(node.outputs[0], new.outputs[0])
    graph.remove(node, safe=True)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new`: in its uses, among the graph's outputs, and in name."""
    name, shape, kind = old.name, old.shape, old.type
    replace_uses(old, new)
    graph = old.producer().graph if old.producer() is not None else None  # type: ignore[union-attr]
    if isinstance(graph, ir.Graph):
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
    old.name = f"{name}.replaced"
    new.name, new.shape, new.type = name, shape, kind
