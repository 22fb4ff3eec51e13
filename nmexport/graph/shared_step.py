"""The graph that runs one step of many sequences on a CPU, made from an exported one.

The tokens of all sequences lie one behind the other on one axis, prompts and answers alike:

    tokens of a   tokens of b   c   d
    ───────────── ───────────── ─── ───   [1, T, ...]   linears and norms: token by token
          │             │        │   │
       pages of a    pages of b  …   …    attention: each on its own pages of the cache, in place

A token's result depends on its own sequence alone, bit for bit: attention has no padding, every sum
has one order (plugins/kernels/cpu/step.h), and the dense linears are ours too, since the runtime's
matrix product rounds by the number of rows. So what is not known to go token by token is refused.

| input | shape | meaning |
|---|---|---|
| `input_ids` | `[1, T]` | tokens; those of a sequence follow each other |
| `sequences` | `[T]` int32 | row of `pages` |
| `positions` | `[T]` int32 | place in its sequence |
| `pages` | `[N, P]` int32 | page of the cache with positions `32 p` to `32 p + 31` of a sequence |
| `logits_at` | `[L]` int64 | which tokens get logits `[1, L, V]` |
| `past_key_values.{i}.key` | `[pages, H_kv, D, 32]` | the cache; bind `present` to it |
| `past_key_values.{i}.value` | `[pages, H_kv, 32, D]` | the same |

Weights are named, never read: they stay where the exported file has them. What our own kernels
compute, nearly all of it, is one `Region` (see `regions`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from nmexport.graph.attention_form import (
    PAST_KEYS,
    PAST_VALUES,
    AttentionForm,
    AttentionReader,
    NotRewritableError,
)
from nmexport.graph.contract import op_contract
from nmexport.graph.dense_linears import GatherBeforeHead, UseOurLinears
from nmexport.graph.fused import FUSED, FuseGatedSilu, FuseResidualNorm
from nmexport.graph.initializers import add_initializer
from nmexport.graph.matching import int_attribute, is_op, rank, slice_of
from nmexport.graph.regions import GroupIntoRegions

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = 32
"""Positions of a page: `kPAGE` of plugins/kernels/cpu/step.h."""
_OURS = op_contract().domain
_LAST_AXIS = frozenset({"RMSNormalization", "LayerNormalization", "Softmax", "Split", "Concat"})
"""Ops that go token by token where they work along the last axis."""
_BY_TOKEN = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Reciprocal", "Pow", "Exp", "Erf", "Tanh"}
    | {
        "Sigmoid",
        "Gelu",
        "Relu",
        "Silu",
        "Swish",
        "Clip",
        "Min",
        "Max",
        "Where",
        "Cast",
        "Identity",
    }
    | {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Gather", "Shape", "Constant"}
)
"""Ops that compute each element from elements of its own token, or move whole tokens."""


def rewrite_for_shared_step(model: ir.Model, *, positions: int) -> None:
    """Turn an exported float32 model into the one described above, in place.

    Args:
        model: The exported model; its external weights need not be readable.
        positions: How many positions the rotary tables cover.

    Raises:
        NotRewritableError: if some part has a form that no rule takes, or is not known to go token
            by token; the model is then spoilt.
    """
    _check_types(model.graph)
    _replace_attention(model, positions)
    FuseResidualNorm(has_own_norm=True)(model)
    FuseGatedSilu()(model)
    GatherBeforeHead()(model)
    UseOurLinears(frozenset({ir.DataType.FLOAT}), whole_groups=False)(model)
    _make_batch_constant(model.graph)
    common.RemoveUnusedNodesPass()(model)
    _drop_old_inputs(model.graph)
    _check_by_token(model.graph)
    common.RemoveUnusedOpsetsPass()(model)
    model.graph.sort()
    GroupIntoRegions()(model)


def _check_types(graph: ir.Graph) -> None:
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None or logits.dtype != ir.DataType.FLOAT:
        name = "no logits" if logits is None or logits.dtype is None else logits.dtype.name.lower()
        raise NotRewritableError(f"{name}: a shared step computes in float32")


def _replace_attention(model: ir.Model, positions: int) -> None:
    """Replace every `Attention` over a cache by `PagedAttention` on its pages."""
    graph = model.graph
    reader = AttentionReader(graph, positions)
    places = [
        ir.val("sequences", dtype=ir.DataType.INT32, shape=["tokens"]),
        ir.val("positions", dtype=ir.DataType.INT32, shape=["tokens"]),
        ir.val("pages", dtype=ir.DataType.INT32, shape=["sequences", "pages"]),
    ]
    for node in reader.nodes():
        form = reader.read(node)
        past = form.node.inputs[PAST_KEYS], form.node.inputs[PAST_VALUES]
        fused = _paged_attention(form, places)
        form.replace_by(fused)
        keys = (form.kv_heads, form.head_size, PAGE)
        values = (form.kv_heads, PAGE, form.head_size)
        for index, shape in enumerate((keys, values)):
            for value in (past[index], fused.outputs[index + 1]):
                if value is not None:
                    value.shape = ir.Shape([ir.SymbolicDim("cache_pages"), *shape])
    graph.inputs.extend(places)
    graph.opset_imports[FUSED] = 1


def _paged_attention(form: AttentionForm, places: Sequence[ir.Value]) -> ir.Node:
    is_packed = len(form.sources) == 1
    scale = form.head_size**-0.5 if form.scale is None else form.scale
    return ir.Node(
        FUSED,
        "PagedAttention",
        [
            *form.sources,
            *([None, None] if is_packed else []),
            *places,
            *(form.tables or (None, None)),
            form.node.inputs[PAST_KEYS],
            form.node.inputs[PAST_VALUES],
        ],
        [
            ir.AttrInt64("num_heads", form.heads),
            ir.AttrInt64("kv_num_heads", form.kv_heads),
            ir.AttrFloat32("scale", scale),
            ir.AttrInt64("window", max(form.window, 0)),
        ],
        num_outputs=3,
        name=form.node.name,
    )


def _make_batch_constant(graph: ir.Graph) -> None:
    """Replace the batch size that the tracer reads off a cache by the step's one row."""
    for node in list(graph):
        source = node.inputs[0] if is_op(node, "Shape") else None
        if source is None or not source.is_graph_input():
            continue
        is_batch = int_attribute(node, "start", 0) == 0 and int_attribute(node, "end", 99) == 1
        if is_batch and source.name and source.name.startswith("past_key_values."):
            name = f"{node.outputs[0].name}.one"
            one = add_initializer(graph, name, ir.tensor(np.ones(1, np.int64), name=name))
            ir.convenience.replace_all_uses_with(node.outputs[0], one)


def _drop_old_inputs(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if value.name in {"attention_mask", "position_ids"} and not value.uses():
            graph.inputs.remove(value)


def _check_by_token(graph: ir.Graph) -> None:
    """Refuse ops that might mix tokens, or read sizes that differ in a step."""
    for value in graph.inputs:
        readers = [usage.node for usage in value.uses()]
        if value.name == "attention_mask":
            raise NotRewritableError("the attention mask is read outside of attention")
        is_past = value.name is not None and value.name.startswith("past_key_values.")
        if is_past and any(reader.op_type != "PagedAttention" for reader in readers):
            raise NotRewritableError(f"{value.name} is read outside of attention")
    for node in graph:
        if node.domain == _OURS:
            phase = node.attributes.get("phase")
            if phase is not None and phase.as_string() != "all":
                raise NotRewritableError("sparse in one phase alone, and a step has tokens of both")
        elif node.domain != FUSED and not _goes_by_token(node):
            raise NotRewritableError(f"{node.op_type} is not known to go token by token")


def _goes_by_token(node: ir.Node) -> bool:
    if node.domain not in {"", "ai.onnx"}:
        return False
    if node.op_type == "Slice":
        part = slice_of(node.outputs[0])
        return part is not None and part[1] == (rank(part[0]) or 0) - 1
    if node.op_type in _LAST_AXIS:
        # A Concat of shapes has one axis, and that is the last.
        value = node.outputs[0] if node.op_type == "Concat" else node.inputs[0]
        last = None if value is None or value.shape is None else (rank(value) or 0) - 1
        axis = int_attribute(node, "axis", 0 if node.op_type in {"Split", "Concat"} else -1)
        return axis in {-1, last} or (node.op_type == "Concat" and last is None and axis == 0)
    return node.op_type in _BY_TOKEN
