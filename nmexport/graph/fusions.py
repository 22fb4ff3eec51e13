"""Rewrites that replace many nodes by one standard op of opset 23.

What torch leaves of a rotary embedding or of cached attention is a dozen nodes a layer, each of
which costs a launch and a pass over memory. Decoding one token of a small model spends a fifth of
its time there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from nmexport.graph.initializers import add_initializer
from nmexport.graph.matching import (
    int_attribute,
    integers,
    is_op,
    made_by,
    only_use,
    rank,
    scalar,
    slice_of,
    static_size,
)
from nmexport.graph.rewriting import take_place

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROTARY_RANK = 4  # [B, H, S, D]
_FIRST_ROTARY_OPSET = 23


class _OpsetPass(ir.passes.InPlacePass):
    """A rewrite whose result needs opset 23."""

    def requires(self, model: ir.Model) -> None:
        opset = model.graph.opset_imports.get("", 0)
        if opset < _FIRST_ROTARY_OPSET:
            raise ir.passes.PreconditionError(f"opset {opset}, needs {_FIRST_ROTARY_OPSET}")


class FuseRotaryEmbedding(_OpsetPass):
    """`x * cos + rotate_half(x) * sin` becomes `RotaryEmbedding`.

    1. cos and sin are `Unsqueeze(c, 1)` of `c [B, S, D]` whose halves are the same by
       construction: made from `Concat(f, f)` by nothing but elementwise work.
    2. `rotate_half(x) = Concat(-x[..., D/2:], x[..., :D/2])` with a static D.
    3. The op is given `c[..., :D/2]`: one Slice each for all layers.

    Requires: opset 23. Ensures: same values within rounding; nodes left unused stay for a later
    sweep.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        halves: dict[ir.Value, ir.Value] = {}
        modified = False
        for node in model.graph:
            match = _match_rotary(node)
            if match is None:
                continue
            x, cosine, sine = match
            size = static_size(x, 3)
            caches = [_half(item, (size or 0) // 2, halves) for item in (cosine, sine)]
            fused = ir.node("RotaryEmbedding", [x, *caches])
            take_place(model.graph, [node], fused, node.outputs)
            modified = True
        return ir.passes.PassResult(model, modified)


def _match_rotary(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Match `(x, cos [B, S, D], sin [B, S, D])` where the node is the pattern's last Add."""
    if not is_op(node, "Add"):
        return None
    factors = [made_by(value, "Mul") for value in node.inputs]
    for plain, rotated in (factors, factors[::-1]):
        if plain is None or rotated is None:
            continue
        for half_turn, sine in _orders(rotated):
            x = _match_rotated_half(half_turn)
            cosine = None if x is None else next((c for v, c in _orders(plain) if v is x), None)
            tables = [_match_duplicated_table(item) for item in (cosine, sine)]
            if x is not None and tables[0] is not None and tables[1] is not None:
                return x, tables[0], tables[1]
    return None


def _orders(node: ir.Node) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    yield node.inputs[0], node.inputs[1]
    yield node.inputs[1], node.inputs[0]


def _match_rotated_half(value: ir.Value | None) -> ir.Value | None:
    """Match the x of `Concat(-x[..., D/2:], x[..., :D/2])`."""
    concat = made_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2:  # noqa: PLR2004 (two halves)
        return None
    negated = made_by(concat.inputs[0], "Neg")
    upper = None if negated is None else slice_of(negated.inputs[0])
    lower = slice_of(concat.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0]:
        return None
    x = upper[0]
    size = static_size(x, 3)
    if rank(x) != _ROTARY_RANK or size is None:
        return None
    is_last = int_attribute(concat, "axis", 0) in {-1, 3}
    bounds = (upper[1:], lower[1:])
    return x if is_last and bounds == ((3, size // 2, size), (3, 0, size // 2)) else None


def _match_duplicated_table(value: ir.Value | None) -> ir.Value | None:
    """Match the `c [B, S, D]` of `Unsqueeze(c, 1)`, where both halves of c are the same."""
    unsqueeze = made_by(value, "Unsqueeze")
    if unsqueeze is None or integers(unsqueeze.inputs[1]) != [1]:
        return None
    table = unsqueeze.inputs[0]
    return table if _has_equal_halves(table) else None


def _has_equal_halves(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return False
    if node.op_type in {"Cos", "Sin", "Cast"}:
        return _has_equal_halves(node.inputs[0])
    if node.op_type == "Mul":
        table, factor = node.inputs if scalar(node.inputs[1]) is not None else node.inputs[::-1]
        return scalar(factor) is not None and _has_equal_halves(table)
    is_pair = node.op_type == "Concat" and len(node.inputs) == 2  # noqa: PLR2004
    return is_pair and node.inputs[0] is node.inputs[1]


def _half(table: ir.Value, size: int, halves: dict[ir.Value, ir.Value]) -> ir.Value:
    """Slice `table[..., :size]`, once a table, right behind the table."""
    producer = table.producer()
    if table in halves or producer is None or producer.graph is None:
        return halves[table]
    graph = producer.graph
    bounds = [
        _int64_constant(graph, f"{table.name}.half.{what}", item)
        for what, item in (("start", 0), ("end", size), ("axis", 2))
    ]
    node = ir.node("Slice", [table, *bounds])
    node.outputs[0].name = f"{table.name}.half"
    node.outputs[0].type = table.type
    graph.insert_after(producer, node)
    halves[table] = node.outputs[0]
    return halves[table]


def _int64_constant(graph: ir.Graph, name: str, item: int) -> ir.Value:
    return add_initializer(graph, name, ir.tensor([item], dtype=ir.DataType.INT64, name=name))


class FuseCachedAttention(_OpsetPass):
    """`Attention` over concatenated caches takes the caches itself, on 3-D tensors where it can.

    1. `Attention(q, Concat(past, k), Concat(past, v), mask)` becomes
       `Attention(q, k, v, mask, past_k, past_v)` with the concatenations as outputs.
    2. Where q, k and v are `Transpose(Reshape(x))` or the rotary embedding of that, and the result
       is transposed and reshaped back, the `x [B, S, H * D]` are used as they are.

    Requires: opset 23, attention traced on `[B, H, S, D]`. Ensures: same values.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if is_op(node, "Attention") and _take_caches(model.graph, node):
                modified = True
        for node in model.graph:
            if is_op(node, "Attention") and _flatten_heads(model.graph, node):
                modified = True
        return ir.passes.PassResult(model, modified)


def _take_caches(graph: ir.Graph, node: ir.Node) -> bool:
    """Rule 1."""
    concats = [_cache_concat(node.inputs[index]) for index in (1, 2)]
    if len(node.inputs) != 4 or None in concats:  # noqa: PLR2004 (q, k, v, mask)
        return False
    keys, values = (concat for concat in concats if concat is not None)
    query, _, _, mask = node.inputs
    fused = ir.Node(
        "",
        "Attention",
        [query, keys.inputs[1], values.inputs[1], mask, keys.inputs[0], values.inputs[0]],
        node.attributes.values(),
        num_outputs=3,
    )
    old = [node.outputs[0], keys.outputs[0], values.outputs[0]]
    for before, after in zip(old, fused.outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node, keys, values], [fused], old, fused.outputs
    )
    return True


def _cache_concat(value: ir.Value | None) -> ir.Node | None:
    """Match the Concat of a graph input and the new tokens along the sequence, used once."""
    concat = made_by(value, "Concat")
    if concat is None or len(concat.inputs) != 2 or int_attribute(concat, "axis", 0) not in {-2, 2}:  # noqa: PLR2004
        return None
    past = concat.inputs[0]
    if past is None or not past.is_graph_input() or len(concat.outputs[0].uses()) != 1:
        return None
    return concat


def _flatten_heads(graph: ir.Graph, node: ir.Node) -> bool:
    """Rule 2."""
    flat = [_flat_source(value) for value in node.inputs[:3]]
    end = _match_flattened_result(node)
    heads = [static_size(value, 1) for value in node.inputs[:2]]
    if None in flat or end is None or None in heads:
        return False
    inputs = [_as_flat(graph, node, value) for value in node.inputs[:3]]
    counts = [
        ir.AttrInt64(name, count or 0)
        for name, count in zip(("q_num_heads", "kv_num_heads"), heads, strict=True)
    ]
    fused = ir.Node(
        "",
        "Attention",
        [*inputs, *node.inputs[3:]],
        [*node.attributes.values(), *counts],
        num_outputs=len(node.outputs),
    )
    old = [end.outputs[0], *node.outputs[1:]]
    for before, after in zip(old, fused.outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    transpose = end.inputs[0].producer() if end.inputs[0] is not None else None
    ir.convenience.replace_nodes_and_values(
        graph, node, [end, *([transpose] if transpose else []), node], [fused], old, fused.outputs
    )
    return True


def _flat_source(value: ir.Value | None) -> ir.Value | None:
    """Find the `x [B, S, H * D]` behind `[B, H, S, D]`, through a rotary embedding or none."""
    rotary = made_by(value, "RotaryEmbedding")
    transpose = made_by(value if rotary is None else rotary.inputs[0], "Transpose")
    if transpose is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    reshape = made_by(transpose.inputs[0], "Reshape")
    source = None if reshape is None else reshape.inputs[0]
    return source if source is not None and rank(source) == _ROTARY_RANK - 1 else None


def _match_flattened_result(node: ir.Node) -> ir.Node | None:
    """Match the Reshape to `[B, S, H * D]` that alone follows the node, behind a Transpose."""
    transpose = only_use(node.outputs[0], "Transpose")
    reshape = None if transpose is None else only_use(transpose.outputs[0], "Reshape")
    if reshape is None or rank(reshape.outputs[0]) != _ROTARY_RANK - 1:
        return None
    return reshape


def _as_flat(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """Return the flat form of one of q, k, v, with the rotary embedding redone on it."""
    source = _flat_source(value)
    rotary = made_by(value, "RotaryEmbedding")
    if rotary is None or value is None or source is None:
        return source
    heads = static_size(value, 1)
    flat = ir.Node(
        "",
        "RotaryEmbedding",
        [source, *rotary.inputs[1:]],
        [*rotary.attributes.values(), ir.AttrInt64("num_heads", heads or 0)],
    )
    flat.outputs[0].name = f"{value.name}.flat"
    flat.outputs[0].shape, flat.outputs[0].type = source.shape, source.type
    graph.insert_before(node, flat)
    return flat.outputs[0]
