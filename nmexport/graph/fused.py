"""Ops of domain `nmexport.fused` for what lies between the linears: norms and gated activations.

Only graphs made for one provider use them: see `cuda` and `shared_step`. Each travels with a
function body, for providers that have no kernel for it.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from nmexport.graph.matching import (
    int_attribute,
    integers,
    is_op,
    made_by,
    only_use,
    rank,
    static_size,
)
from nmexport.graph.rewriting import take_place

FUSED = "nmexport.fused"
"""Domain of these ops."""
_VECTOR = 8
"""Elements that our kernels read at a time."""
_GATED_SILU = f"""<opset_import: ["" : 23], domain: "{FUSED}">
GatedSilu (X) => (Y) {{
    g, u = Split <axis: int = -1, num_outputs: int = 2> (X)
    weight = Sigmoid (g)
    active = Mul (g, weight)
    Y = Mul (active, u)
}}"""
_GATED_SILU_PAIR = f"""<opset_import: ["" : 23], domain: "{FUSED}">
GatedSiluPair (gate, up) => (Y) {{
    weight = Sigmoid (gate)
    active = Mul (gate, weight)
    Y = Mul (active, up)
}}"""
_NORM = f"""<opset_import: ["" : 23], domain: "{FUSED}">
Norm <epsilon> (X, weight) => (Y) {{
    Y = RMSNormalization <axis: int = -1, epsilon: float = @epsilon> (X, weight)
}}"""
_RESIDUAL_NORM = f"""<opset_import: ["" : 23], domain: "{FUSED}">
ResidualNorm <epsilon> (X, skip, weight) => (Y, sum) {{
    sum = Add (X, skip)
    Y = RMSNormalization <axis: int = -1, epsilon: float = @epsilon> (sum, weight)
}}"""


class FuseResidualNorm(ir.passes.InPlacePass):
    """Norms become the provider's own kernels, with the residual sum inside where there is one.

    1. `RMSNormalization(a + b)` becomes our `ResidualNorm(a, b)`, which also gives the sum, for
       tensors `[B, S, D]`, D a multiple of 8.
    2. Any other over the last axis becomes `SimplifiedLayerNormalization`, which is the runtime's;
       or our `Norm`, whose bits depend on the row alone.

    Requires: nothing. Ensures: same values within rounding.
    """

    def __init__(self, *, has_own_norm: bool = False) -> None:
        """Take our `Norm` where there is no residual sum."""
        super().__init__()
        self._has_own_norm = has_own_norm

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if not is_op(node, "RMSNormalization") or int_attribute(node, "axis", -1) != -1:
                continue
            total = made_by(node.inputs[0], "Add")
            if total is None or not _is_residual(total):
                _use_simple_norm(model.graph, node, is_own=self._has_own_norm)
            else:
                _fuse_norm(model.graph, total, node)
            modified = True
        if modified:
            add_function(model, _RESIDUAL_NORM)
            if self._has_own_norm:
                add_function(model, _NORM)
        return ir.passes.PassResult(model, modified)


def _is_residual(total: ir.Node) -> bool:
    ranks = [rank(value) for value in total.inputs if value is not None]
    width = static_size(total.outputs[0], -1)
    return ranks == [3, 3] and width is not None and width % _VECTOR == 0


def _epsilon(node: ir.Node) -> ir.Attr:
    given = node.attributes.get("epsilon")
    return ir.AttrFloat32("epsilon", 1e-5 if given is None else given.as_float())


def _use_simple_norm(graph: ir.Graph, node: ir.Node, *, is_own: bool) -> None:
    inputs, epsilon = node.inputs[:2], _epsilon(node)
    if is_own:
        fused = ir.Node(FUSED, "Norm", inputs, [epsilon], name=node.name)
    else:  # Its home is the default domain, an old habit of the runtime.
        attributes = [epsilon, ir.AttrInt64("axis", -1)]
        fused = ir.Node("", "SimplifiedLayerNormalization", inputs, attributes, name=node.name)
    take_place(graph, [node], fused, node.outputs)


def _fuse_norm(graph: ir.Graph, total: ir.Node, node: ir.Node) -> None:
    fused = ir.Node(
        FUSED,
        "ResidualNorm",
        [*total.inputs, node.inputs[1]],
        [_epsilon(node)],
        num_outputs=2,
        name=node.name,
    )
    # The sum's other readers may stand between the Add and the norm, so the pair takes the
    # place of the Add; the graph is sorted at the end.
    old = [node.outputs[0], total.outputs[0]]
    new = list(fused.outputs)
    for before, after in zip(old, new, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(graph, total, [node, total], [fused], old, new)


class FuseGatedSilu(ir.passes.InPlacePass):
    """`silu(g) * u` becomes one op.

    1. Of a packed product `[g | u]`, whose Split hands them to this alone: `GatedSilu(packed)`.
    2. Any other g and u of one shape: `GatedSiluPair(g, u)`.

    Requires: a last axis that is a multiple of 8. Ensures: same values within rounding.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            gate, up = _gate_and_up(node)
            if gate is None or up is None:
                continue
            packed = _match_packed_halves(gate, up)
            if packed is not None:
                fused = ir.Node(FUSED, "GatedSilu", [packed], name=node.name)
            else:
                fused = ir.Node(FUSED, "GatedSiluPair", [gate, up], name=node.name)
            take_place(model.graph, [node], fused, node.outputs)
            add_function(model, _GATED_SILU if packed is not None else _GATED_SILU_PAIR)
            modified = True
        return ir.passes.PassResult(model, modified)


def _gate_and_up(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Match the g and u where the node ends `silu(g) * u`."""
    width = static_size(node.outputs[0], -1)
    if not is_op(node, "Mul") or width is None or width % _VECTOR:
        return None, None
    for active, up in (node.inputs, node.inputs[::-1]):
        silu = made_by(active, "Mul")
        if silu is None or active is None or only_use(active, "Mul") is None:
            continue
        for gate, weight in (silu.inputs, silu.inputs[::-1]):
            sigmoid = made_by(weight, "Sigmoid")
            is_silu = sigmoid is not None and sigmoid.inputs[0] is gate
            if is_silu and gate is not None and up is not None and _same_shape(gate, up):
                return gate, up
    return None, None


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    return first.shape is not None and first.shape == second.shape


def _match_packed_halves(gate: ir.Value, up: ir.Value) -> ir.Value | None:
    """Find the value that a Split cuts into exactly these two."""
    split = made_by(gate, "Split")
    is_pair = split is not None and list(split.outputs) == [gate, up] and _halves(split)
    return split.inputs[0] if split is not None and is_pair else None


def _halves(split: ir.Node) -> bool:
    source = split.inputs[0]
    is_last = source is not None and int_attribute(split, "axis", 0) in {
        -1,
        (rank(source) or 0) - 1,
    }
    sizes = integers(split.inputs[1]) if len(split.inputs) > 1 else [1, 1]
    return is_last and sizes is not None and len(sizes) == 2 and sizes[0] == sizes[1]  # noqa: PLR2004


def add_function(model: ir.Model, text: str, *, overload: str = "") -> None:
    """Give the model the body of an op of ours, for providers that have no kernel for it.

    Args:
        model: Gets the function, and imports its domain.
        text: The function in ONNX's text form.
        overload: Tells bodies of one op apart, where nodes with other inputs need others.
    """
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    function.overload = overload
    model.functions[function.identifier()] = function
    model.graph.opset_imports[FUSED] = 1
