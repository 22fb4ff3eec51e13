"""Nodes of ours that follow each other become one node, which a team of threads runs.

A runtime takes microseconds for each node and each parallel loop, and a decode step has some 250
nodes that compute for ten. In a `Region` the threads stay together from node to node
(plugins/onnxruntime/fused_op.h says what its attributes mean).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from nmexport.graph.contract import op_contract
from nmexport.graph.fused import FUSED

if TYPE_CHECKING:
    from collections.abc import Iterable

_OURS = op_contract().domain
_FUSED_OPS = frozenset({"PagedAttention", "Norm", "ResidualNorm", "GatedSilu", "GatedSiluPair"})
_LEAST_NODES = 2


class GroupIntoRegions(ir.passes.InPlacePass):
    """Runs of our nodes become `Region` nodes, as long as can be.

    1. A run has `NMLinear` whose inputs but X are initializers, and the ops of `nmexport.fused` for
       the CPU, all in float32.
    2. Any other node goes in front of the run where it needs nothing from it, else behind it; a
       node of ours that needs one behind it begins the next run.
    3. A node alone stays as it is.

    Requires: a sorted graph. Ensures: the same bits.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        outputs = set(graph.outputs)
        modified = False
        for run in _runs(graph):
            if len(run.nodes) >= _LEAST_NODES:
                _replace(graph, run.nodes, outputs)
                modified = True
        if modified:
            graph.opset_imports[FUSED] = 1
            graph.sort()
        return ir.passes.PassResult(model, modified)


@dataclass
class _Run:
    """A run of nodes that a region can hold, in order."""

    nodes: list[ir.Node] = field(default_factory=list)
    made: set[ir.Value] = field(default_factory=set)
    """Outputs of these nodes."""
    behind: set[ir.Value] = field(default_factory=set)
    """Outputs of other nodes that depend on those."""

    def takes(self, node: ir.Node) -> bool:
        """Add a node; False if it needs something that can only follow the run."""
        if any(value in self.behind for value in node.inputs):
            return False
        self.nodes.append(node)
        self.made.update(node.outputs)
        return True

    def pass_over(self, node: ir.Node) -> None:
        """Note a node that no region can hold."""
        if any(value in self.made or value in self.behind for value in _read_by(node)):
            self.behind.update(node.outputs)


def _read_by(node: ir.Node) -> Iterable[ir.Value | None]:
    """List the inputs of a node and of the nodes in its subgraphs."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs


def _runs(graph: ir.Graph) -> list[_Run]:
    runs = [_Run()]
    for node in graph:
        if not _is_ours(node):
            runs[-1].pass_over(node)
        elif not runs[-1].takes(node):
            runs.append(_Run())
            runs[-1].takes(node)
    return runs


def _is_ours(node: ir.Node) -> bool:
    if any(value.dtype not in {ir.DataType.FLOAT, None} for value in node.outputs):
        return False
    if node.domain == FUSED:
        return node.op_type in _FUSED_OPS
    return (
        (node.domain, node.op_type) == (_OURS, "NMLinear")
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.FLOAT
        and all(value is None or value.is_initializer() for value in node.inputs[1:])
    )


def _replace(graph: ir.Graph, nodes: list[ir.Node], outputs: set[ir.Value]) -> None:
    """Replace some nodes by one."""
    inside = set(nodes)
    made = [value for node in nodes for value in node.outputs]
    given = [value for node in nodes for value in node.inputs if value is not None]
    inputs = [value for value in dict.fromkeys(given) if value.producer() not in inside]
    numbers = {value: number for number, value in enumerate([*inputs, *made])}
    leaving = [
        value
        for value in made
        if value in outputs or any(usage.node not in inside for usage in value.uses())
    ]
    attributes = [
        ir.AttrInt64("nodes", len(nodes)),
        ir.AttrInt64s("outputs", [numbers[value] for value in leaving]),
    ]
    for index, node in enumerate(nodes):
        attributes += _describe(node, f"node{index}_", numbers)
    region = ir.Node(FUSED, "Region", inputs, attributes, num_outputs=len(leaving))
    for before, after in zip(leaving, region.outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(
        graph, nodes[-1], nodes, [region], leaving, list(region.outputs)
    )


def _describe(node: ir.Node, prefix: str, numbers: dict[ir.Value, int]) -> list[ir.Attr]:
    """Make the region's attributes for one of its nodes."""
    reads = [-1 if value is None else numbers[value] for value in node.inputs]
    own = [
        ir.Attr(prefix + attribute.name, attribute.type, attribute.value)
        for attribute in node.attributes.values()
    ]
    return [
        ir.AttrString(f"{prefix}op", node.op_type),
        ir.AttrInt64s(f"{prefix}inputs", reads),
        ir.AttrInt64s(f"{prefix}outputs", [numbers[value] for value in node.outputs]),
        *own,
    ]
