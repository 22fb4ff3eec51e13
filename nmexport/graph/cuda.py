"""The graph that ONNX Runtime's CUDA provider runs fastest, made from an exported one.

The exported file is portable: standard ops, a mask and positions as inputs, caches that grow by
concatenation. A decode step of it spends half of its time between the linears. The graph made here
computes the same with what the provider has for it:

    packed q, k, v ──► GroupQueryAttention ──► linear ──► norm of the residual sum ──► linear ──►
                        ▲ rotary, mask and cache append inside; the cache is written in place

Inputs differ from the exported file's:

| input | shape | meaning |
|---|---|---|
| `input_ids` | `[B, S]` | the new tokens; prompts of different lengths are padded on the right |
| `last_positions` | `[B]` int32 | position of each sequence's last new token, padding not counted |
| `total_sequence_length` | `[]` int32, host | longest sequence, new tokens included, or a bound |
| `logits_at` | `[L]` int64 | which of the S new tokens get logits |
| `past_key_values.{i}.key`, `.value` | `[B, H_kv, capacity, D]` | the cache; bind `present` to it |

Weights are named, never read: they stay where the exported file has them.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from nmexport.graph.contract import op_contract
from nmexport.graph.cuda_attention import NotRewritableError, ReplaceAttention
from nmexport.graph.cuda_fusions import FuseGatedSilu, FuseResidualNorm
from nmexport.graph.matching import is_op, only_use, rank, static_size
from nmexport.graph.rewriting import take_place

LOGITS_AT = "logits_at"
_DOMAIN = op_contract().domain
_GROUP = 16
"""Channels of a group that is kept whole: no result depends on it."""


def rewrite_for_cuda(model: ir.Model, *, positions: int) -> None:
    """Turn an exported model into the one described above, in place.

    Args:
        model: The exported model; its external weights need not be readable.
        positions: How many positions the rotary tables cover.

    Raises:
        NotRewritableError: if some layer's attention has another form; the model is then spoilt.
    """
    ReplaceAttention(positions)(model)
    FuseResidualNorm()(model)
    FuseGatedSilu()(model)
    GatherBeforeHead()(model)
    UseOurLinears()(model)
    common.RemoveUnusedNodesPass()(model)
    _drop_unused_inputs(model.graph)
    common.RemoveUnusedOpsetsPass()(model)
    model.graph.sort()


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

    `x @ W`, with the `Add` of a bias where one follows, on a constant W of a half type. At one
    token our kernel over all rows is the fastest dense one on most shapes, and it is launched
    before the kernel ahead of it ends; at many tokens it is the same product as the runtime's.

    Requires: opset of domain `nmexport` imported or free. Ensures: same values within rounding.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight = node.inputs[1] if is_op(node, "MatMul") else None
            if weight is None or not _is_our_kind(weight):
                continue
            bias = _bias_after(node)
            inputs = [*node.inputs, *([bias[1]] if bias else [])]
            pattern = [ir.AttrInt64(name, _GROUP) for name in ("n", "m")]
            fused = ir.Node(_DOMAIN, "NMLinear", inputs, pattern, name=node.name)
            fused.metadata_props.update(node.metadata_props)
            end = bias[0] if bias else node
            take_place(model.graph, [node, *([end] if bias else [])][::-1], fused, end.outputs)
            modified = True
        if modified:
            model.graph.opset_imports.setdefault(_DOMAIN, op_contract().opset_version)
        return ir.passes.PassResult(model, modified)


def _is_our_kind(weight: ir.Value) -> bool:
    rows = static_size(weight, 0)
    return (
        weight.is_initializer()
        and rank(weight) == 2  # noqa: PLR2004
        and weight.dtype in {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        and rows is not None
        and rows % _GROUP == 0
    )


def _bias_after(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The `Add` of a constant vector that alone reads the product, and the vector."""
    add = only_use(node.outputs[0], "Add")
    if add is None:
        return None
    bias = next((value for value in add.inputs if value is not node.outputs[0]), None)
    return (add, bias) if bias is not None and bias.is_initializer() and rank(bias) == 1 else None


def _drop_unused_inputs(graph: ir.Graph) -> None:
    unused = [
        value
        for value in graph.inputs
        if not value.uses() and value.name in {"attention_mask", "position_ids"}
    ]
    for value in unused:
        graph.inputs.remove(value)
