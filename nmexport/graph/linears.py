"""Maps nodes of an exported model to the linears they stand for, and to their results.

Linears that share an input are fused: one node with their weights side by side, `[K, sum of O]`,
and a `Split` that hands each its columns. Such a node says which linears it stands for in its
metadata; a node of a single linear carries that linear's name.

    x ──► NMLinear q_proj+k_proj+v_proj ──► Split ──► q_proj's, k_proj's, v_proj's output
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx

LINEARS = "nmexport.linears"
"""Metadata key of a fused node; its value names the linears in column order, one a line."""


@dataclass(frozen=True)
class PlacedLinear:
    """One linear of the model in a graph."""

    name: str
    """Dotted module name."""
    node: onnx.NodeProto
    """The node that computes it, perhaps together with others."""
    output: str
    """Name of the value that holds this linear's result."""


def fused_name(names: Sequence[str]) -> str:
    """Name a node of several linears: `layers.0.mlp.gate_proj+up_proj`."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1 or len(names) == 1:
        return "+".join(names)
    parent = parents.pop()
    leaves = "+".join(name.rpartition(".")[2] for name in names)
    return f"{parent}.{leaves}" if parent else leaves


def linears_of_node(node: onnx.NodeProto) -> tuple[str, ...]:
    """List the linears that a node stands for, in the order of its columns."""
    for entry in node.metadata_props:
        if entry.key == LINEARS:
            return tuple(entry.value.split("\n"))
    return (node.name,)


def placed_linears(
    graph: onnx.GraphProto, op_type: str, *, domain: str = ""
) -> dict[str, PlacedLinear]:
    """List every linear that nodes of an op stand for, by name, in graph order.

    Raises:
        ArtifactError: if a fused node is not followed by the Split that takes it apart.
    """
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)
    return {
        linear.name: linear
        for node in graph.node
        if node.op_type == op_type and node.domain == domain
        for linear in _linears_at(node, users)
    }


def _linears_at(
    node: onnx.NodeProto, users: dict[str, list[onnx.NodeProto]]
) -> Iterator[PlacedLinear]:
    names = linears_of_node(node)
    if len(names) == 1:
        yield PlacedLinear(names[0], node, node.output[0])
        return
    split = _split_behind(node.output[0], users)
    if split is None or len(split.output) != len(names):
        raise ArtifactError(
            f"Node {node.name} stands for {len(names)} linears, and no Split takes its result "
            "apart.",
            fix="export again",
        )
    for name, output in zip(names, split.output, strict=True):
        yield PlacedLinear(name, node, output)


def _split_behind(value: str, users: dict[str, list[onnx.NodeProto]]) -> onnx.NodeProto | None:
    """Find the Split of a value, behind the bias of a dense linear where it has one."""
    readers = users.get(value, [])
    if len(readers) == 1 and readers[0].op_type == "Add":
        readers = users.get(readers[0].output[0], [])
    splits = [node for node in readers if node.op_type == "Split"]
    return splits[0] if splits else None
