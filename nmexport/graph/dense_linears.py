"""Dense linears and the output head, as graphs made for one provider have them."""

from __future__ import annotations

import onnx_ir as ir

from nmexport.graph.attention_form import NotRewritableError
from nmexport.graph.contract import op_contract
from nmexport.graph.matching import is_op, made_by, only_use, rank, static_size
from nmexport.graph.rewriting import take_place

LOGITS_AT = "logits_at"
_DOMAIN = op_contract().domain
_GROUP = 16
"""Channels of a group that is kept whole: no result depends on it."""


class GatherBeforeHead(ir.passes.InPlacePass):
    """Logits are computed for the tokens at `logits_at` alone.

    A prompt's logits are the largest product of the whole model, and generation reads the last row.

    Requires: `logits` follows one product with the output head, and elementwise nodes.
    Ensures: the same logits for the tokens that are asked for.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        head = _head_of(logits)
        if head is None or head.inputs[0] is None:
            raise NotRewritableError("no product that makes the logits")
        places = ir.val(LOGITS_AT, dtype=ir.DataType.INT64, shape=["logits_length"])
        graph.inputs.append(places)
        source = head.inputs[0]
        gather = ir.Node("", "Gather", [source, places], [ir.AttrInt64("axis", 1)])
        output = gather.outputs[0]
        output.name, output.type = f"{source.name}.at", source.type
        graph.insert_before(head, gather)
        head.replace_input_with(0, output)
        if logits is not None and logits.shape is not None:
            shape = list(logits.shape)
            shape[1] = ir.SymbolicDim("logits_length")
            logits.shape = ir.Shape(shape)
        return ir.passes.PassResult(model, modified=True)


_AFTER_HEAD = frozenset({"Add", "Mul", "Div", "Tanh", "Cast"})


def _head_of(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _AFTER_HEAD:
        source = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
        node = None if source is None else source.producer()
    return node if node is not None and node.op_type in {"MatMul", "NMLinear"} else None


class UseOurLinears(ir.passes.InPlacePass):
    """Dense linears become `NMLinear` that keeps every channel.

    `x @ W`, with the `Add` of a bias where one follows, on a constant W, or one that is a constant
    turned by a Transpose. On a GPU our kernel over all rows is the fastest dense one at one token
    on most shapes, and it is launched before the kernel ahead of it ends; at many tokens it is the
    same product as the runtime's. On a CPU it gives a token the same bits in any company.

    Requires: opset of domain `nmexport` imported or free. Ensures: same values within rounding.
    """

    def __init__(self, types: frozenset[ir.DataType], *, whole_groups: bool) -> None:
        """Take weights of some types alone, and of K a multiple of 16 where groups are whole."""
        super().__init__()
        self._types = types
        self._whole_groups = whole_groups

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight = node.inputs[1] if is_op(node, "MatMul") else None
            group = None if weight is None else self._group_of(weight)
            if group is None:
                continue
            bias = _bias_after(node)
            inputs = [*node.inputs, *([bias[1]] if bias else [])]
            pattern = [ir.AttrInt64(name, group) for name in ("n", "m")]
            fused = ir.Node(_DOMAIN, "NMLinear", inputs, pattern, name=node.name)
            fused.metadata_props.update(node.metadata_props)
            end = bias[0] if bias else node
            take_place(model.graph, [node, *([end] if bias else [])][::-1], fused, end.outputs)
            modified = True
        if modified:
            model.graph.opset_imports.setdefault(_DOMAIN, op_contract().opset_version)
        return ir.passes.PassResult(model, modified)

    def _group_of(self, weight: ir.Value) -> int | None:
        """Return the channels of a group kept whole, for a weight `[K, O]`; None for others."""
        turned = made_by(weight, "Transpose")
        source = weight if turned is None else turned.inputs[0]
        rows = static_size(source, 0 if turned is None else 1)
        is_ours = (
            source is not None
            and source.is_initializer()
            and rank(source) == 2  # noqa: PLR2004
            and source.dtype in self._types
            and rows is not None
        )
        if not is_ours or rows is None:
            return None
        group = next(size for size in range(_GROUP, 0, -1) if rows % size == 0)
        return group if group == _GROUP or not self._whole_groups else None


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Find the `Add` of a constant vector that alone reads the product, and the vector."""
    add = only_use(node.outputs[0], "Add")
    if add is None:
        return None
    bias = next((value for value in add.inputs if value is not node.outputs[0]), None)
    return (add, bias) if bias is not None and bias.is_initializer() and rank(bias) == 1 else None
