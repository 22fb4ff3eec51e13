"""Moves the cache out of attention nodes, to nodes of its own, for TensorRT's parser.

before:  Attention(q, k, v, mask, past_k, past_v) -> y, present_k, present_v
after:   present_k = update(past_k, k), present_v = update(past_v, v)
         Attention(scale * q, present_k, present_v, mask) -> y
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from nmexport.graph.initializers import add_constant
from nmexport.graph.matching import is_op
from nmexport.graph.rewriting import take_over

ATTENTION_OP = "Attention"
Update = Callable[[ir.Value, ir.Value], ir.Node]
"""(past, new) -> a node that computes the present."""
_KEY, _VALUE, _ATTENTION_MASK = 1, 2, 3
_PAST_KEY, _PAST_VALUE = 4, 5


def separate_cache(model: ir.Model, update: Update) -> bool:
    """Move the cache of Attention nodes to `update(past, new)` nodes before them."""
    modified = False
    for node in model.graph:
        if is_op(node, ATTENTION_OP) and len(node.inputs) > _PAST_VALUE:
            _separate_one(model.graph, node, update)
            modified = True
    return modified


def _separate_one(graph: ir.Graph, node: ir.Node, update: Update) -> None:
    query, key, value = (node.inputs[index] for index in (0, _KEY, _VALUE))
    past = (node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE])
    if query is None or key is None or value is None or past[0] is None or past[1] is None:
        raise ir.passes.PreconditionError(f"{node.name} lacks an input")
    head_size = past[0].shape[3] if past[0].shape is not None else None
    if not isinstance(head_size, int):
        raise ir.passes.PreconditionError(f"{node.name} has heads of unknown size")
    dtype = query.dtype or past[0].dtype
    if dtype is None:
        raise ir.passes.PreconditionError(f"{node.name} has no element type")
    flat = "q_num_heads" in node.attributes
    name = node.name or "attention"
    if flat:
        kv_heads = node.attributes["kv_num_heads"].as_int()
        heads = (node.attributes["q_num_heads"].as_int(), kv_heads, kv_heads)
        query, key, value = (
            _with_heads(graph, node, x, count, f"{name}.{kind}")
            for x, count, kind in zip((query, key, value), heads, ("q", "k", "v"), strict=True)
        )
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else head_size**-0.5
    query = _scale(graph, node, query, scale, dtype)
    present = []
    states = ((past[0], key), (past[1], value))
    for (cached, new), output in zip(states, node.outputs[1:3], strict=True):
        made = update(cached, new)
        graph.insert_before(node, made)
        take_over(output, made.outputs[0])
        present.append(made.outputs[0])
    # The query carries the scale: as the runtime would have it, the whole cache is scaled each run.
    attributes = {k: v for k, v in node.attributes.items() if not k.endswith("_num_heads")}
    attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    mask = node.inputs[_ATTENTION_MASK]
    attention = ir.node(ATTENTION_OP, [query, *present, mask], name=node.name)
    attention.attributes.update(attributes)
    graph.insert_before(node, attention)
    result = attention.outputs[0]
    if flat:
        result = _drop_heads(graph, node, result, name)
    take_over(node.outputs[0], result)
    graph.remove(node, safe=True)


def _with_heads(graph: ir.Graph, before: ir.Node, x: ir.Value, heads: int, name: str) -> ir.Value:
    """Reshape `[B, S, H * D]` to `[B, H, S, D]`."""
    sizes = add_constant(graph, f"{name}.heads", [0, 0, heads, -1])
    split = ir.node("Reshape", [x, sizes], name=f"{name}.split")
    turned = ir.node(
        "Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{name}.transposed"
    )
    graph.insert_before(before, [split, turned])
    _name_outputs(x, split, turned)
    return turned.outputs[0]


def _drop_heads(graph: ir.Graph, before: ir.Node, x: ir.Value, name: str) -> ir.Value:
    """Reshape `[B, H, S, D]` to `[B, S, H * D]`."""
    turned = ir.node("Transpose", [x], {"perm": [0, 2, 1, 3]}, name=f"{name}.turned")
    sizes = add_constant(graph, f"{name}.flat", [0, 0, -1])
    joined = ir.node("Reshape", [turned.outputs[0], sizes], name=f"{name}.joined")
    graph.insert_before(before, [turned, joined])
    _name_outputs(x, turned, joined)
    return joined.outputs[0]


def _scale(
    graph: ir.Graph, before: ir.Node, query: ir.Value, scale: float, dtype: ir.DataType
) -> ir.Value:
    if scale == 1.0:
        return query
    factor = ir.Value(
        name=f"{before.name}.scale",
        shape=ir.Shape([]),
        type=ir.TensorType(dtype),
        const_value=ir.tensor(np.asarray(scale, dtype=dtype.numpy()), dtype=dtype),
    )
    if factor.name not in graph.initializers:
        graph.register_initializer(factor)
    scaled = ir.node("Mul", [query, graph.initializers[str(factor.name)]])
    scaled.name = f"{before.name}.scaled"
    graph.insert_before(before, scaled)
    _name_outputs(query, scaled)
    return scaled.outputs[0]


def _name_outputs(like: ir.Value, *nodes: ir.Node) -> None:
    for node in nodes:
        node.outputs[0].name = f"{node.name}.output"
        node.outputs[0].type = like.type
