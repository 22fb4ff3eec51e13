"""Reads an exported attention node off the graph: heads, window, rotary, sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from nmexport.graph.initializers import add_initializer
from nmexport.graph.matching import (
    int_attribute,
    is_op,
    made_by,
    only_use,
    rank,
    scalar,
    static_size,
)
from nmexport.graph.rewriting import take_place

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PAST_KEYS, PAST_VALUES = 4, 5
"""Places of Attention's inputs."""
_MASK = 3
_SWAP = [0, 2, 1, 3]
"""Between `[B, S, H, D]` and `[B, H, S, D]`."""


class NotRewritableError(Exception):
    """This graph has a form that no rule takes; the exported file runs in its place."""


@dataclass(frozen=True)
class AttentionForm:
    """An `Attention` node over a cache: its settings and the values it reads."""

    node: ir.Node
    heads: int
    """Of queries."""
    kv_heads: int
    head_size: int
    window: int
    """Return how many positions a token sees, itself included; -1 for all before it."""
    scale: float | None
    """None is the op's own: one over the root of the head size."""
    sources: tuple[ir.Value, ...]
    """Queries, keys, values `[B, S, H * D]`, not turned; or the one value that packs them."""
    tables: tuple[ir.Value, ir.Value] | None
    """Cosines and sines `[positions, rotary / 2]`; None where nothing is turned by position."""

    def replace_by(self, fused: ir.Node) -> None:
        """Replace this by a node with outputs `[B, S, H * D]` and both caches."""
        node, graph = self.node, self.node.graph
        if not isinstance(graph, ir.Graph):
            raise NotRewritableError("attention in a body of its own")
        if "q_num_heads" in node.attributes:
            take_place(graph, [node], fused, node.outputs)
            return
        end = _match_joined_result(node)
        outputs = [end[-1].outputs[0], *node.outputs[1:]]
        take_place(graph, [*reversed(end), node], fused, outputs, at=node)


class AttentionReader:
    """Reads the attention nodes of one graph.

    1. The mask is causal, or causal within a window, and hides padding; nothing else.
    2. Queries and keys are rotary embeddings by the model's positions, or neither is.
    3. Queries, keys and values that one Split takes from a packed product stay packed.

    Requires: exported by this package.
    """

    def __init__(self, graph: ir.Graph, positions: int) -> None:
        """Make rotary tables for that many positions."""
        self._graph = graph
        self._positions = positions
        self._tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}

    def nodes(self) -> list[ir.Node]:
        """List the attention nodes.

        Raises:
            NotRewritableError: if there are none.
        """
        nodes = [node for node in self._graph if is_op(node, "Attention")]
        if not nodes:
            raise NotRewritableError("no attention node of a known form")
        return nodes

    def read(self, node: ir.Node) -> AttentionForm:
        """Read one node; values that it needs in another form are added to the graph.

        Raises:
            NotRewritableError: if it has another form.
        """
        if len(node.inputs) <= PAST_VALUES:
            raise NotRewritableError(f"attention {node.name} has no cache")
        if "softcap" in node.attributes and node.attributes["softcap"].as_float():
            raise NotRewritableError("attention scores that are capped")
        size = static_size(node.inputs[PAST_KEYS], 3)
        if size is None:
            raise NotRewritableError("a head size that is not constant")
        heads, kv_heads = _head_counts(node)
        sources, tables = self._before_rotary(node)
        if "q_num_heads" not in node.attributes:
            sources = [_join_heads(self._graph, node, value) for value in sources]
        packed = _match_packed_source(sources)
        given = [value for value in sources if value is not None]
        return AttentionForm(
            node=node,
            heads=heads,
            kv_heads=kv_heads,
            head_size=size,
            window=_window_of(node.inputs[_MASK]),
            scale=node.attributes["scale"].as_float() if "scale" in node.attributes else None,
            sources=tuple(given) if packed is None else (packed,),
            tables=tables,
        )

    def _before_rotary(
        self, node: ir.Node
    ) -> tuple[list[ir.Value | None], tuple[ir.Value, ir.Value] | None]:
        """Return queries, keys and values before their rotary embedding, and its tables."""
        rotaries = [made_by(value, "RotaryEmbedding") for value in node.inputs[:2]]
        sources = list(node.inputs[:3])
        if rotaries == [None, None]:
            return sources, None
        if rotaries[0] is None or rotaries[1] is None:
            raise NotRewritableError("only one of queries and keys is turned by position")
        cosine, sine = rotaries[0].inputs[1:3]
        if cosine is None or sine is None or list(rotaries[1].inputs[1:3]) != [cosine, sine]:
            raise NotRewritableError("queries and keys are turned by different tables")
        if any(int_attribute(rotary, "interleaved", 0) for rotary in rotaries if rotary):
            raise NotRewritableError("interleaved rotary embedding")
        if (cosine, sine) not in self._tables:
            self._tables[cosine, sine] = _position_tables(
                self._graph, cosine, sine, self._positions
            )
        sources[:2] = [rotaries[0].inputs[0], rotaries[1].inputs[0]]
        return sources, self._tables[cosine, sine]


def _head_counts(node: ir.Node) -> tuple[int, int]:
    """Count the heads of queries, and of keys and values."""
    names = ("q_num_heads", "kv_num_heads")
    if all(name in node.attributes for name in names):
        queries, keys = (node.attributes[name].as_int() for name in names)
        return queries, keys
    sizes = [static_size(value, 1) for value in node.inputs[:2]]
    if sizes[0] is None or sizes[1] is None:
        raise NotRewritableError("a number of heads that is not constant")
    return sizes[0], sizes[1]


def _join_heads(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> ir.Value:
    """Turn `[B, H, S, D]` into `[B, S, H * D]`; a Transpose behind it is undone."""
    if value is None or rank(value) != 4:  # noqa: PLR2004
        raise NotRewritableError("heads on an axis of their own, and no such axis")
    before = made_by(value, "Transpose")
    if before is not None and list(before.attributes["perm"].as_ints()) == _SWAP:
        source = before.inputs[0]
    else:
        swap = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _SWAP)])
        graph.insert_before(node, swap)
        source = swap.outputs[0]
        source.name, source.type = f"{value.name}.by_token", value.type
    size = (static_size(value, 1) or 0) * (static_size(value, 3) or 0)
    shape = _add_joined_shape(graph, size)
    join = ir.Node("", "Reshape", [source, shape])
    graph.insert_before(node, join)
    join.outputs[0].name, join.outputs[0].type = f"{value.name}.joined", value.type
    return join.outputs[0]


def _add_joined_shape(graph: ir.Graph, size: int) -> ir.Value:
    name = f"joined_heads.{size}"
    existing = graph.initializers.get(name)
    return existing or add_initializer(
        graph, name, ir.tensor([0, 0, size], dtype=ir.DataType.INT64, name=name)
    )


def _match_joined_result(node: ir.Node) -> tuple[ir.Node, ir.Node]:
    """Match the Transpose and Reshape to `[B, S, H * D]` that follow the node."""
    transpose = only_use(node.outputs[0], "Transpose")
    reshape = None if transpose is None else only_use(transpose.outputs[0], "Reshape")
    if transpose is None or reshape is None or rank(reshape.outputs[0]) != 3:  # noqa: PLR2004
        raise NotRewritableError("an attention result that is not joined again")
    return transpose, reshape


def _match_packed_source(sources: list[ir.Value | None]) -> ir.Value | None:
    """Find the value that one Split cuts into exactly these three, in order."""
    splits = {source.producer() for source in sources if source is not None}
    split = splits.pop()
    is_split = not splits and split is not None and is_op(split, "Split")
    return split.inputs[0] if is_split and split and list(split.outputs) == sources else None


def _window_of(mask: ir.Value | None) -> int:
    """Return how many positions a token sees, itself included; -1 for all before it.

    Raises:
        NotRewritableError: if the mask says anything else.
    """
    where = made_by(mask, "Where")
    seen = list(_conjuncts(where.inputs[0] if where else None))
    causal, window, padding = False, -1, False
    for value in seen:
        node = value.producer()
        if node is not None and is_op(node, "LessOrEqual"):
            causal = True
        elif node is not None and is_op(node, "Greater"):
            reach = made_by(node.inputs[1], "Sub")
            size = None if reach is None else scalar(reach.inputs[1])
            if size is None or window not in {-1, size}:
                raise NotRewritableError("a window whose size is no constant")
            window = int(size)
        elif _is_padding(value):
            padding = True
        elif not _is_all_true(value):
            raise NotRewritableError(f"mask with {node.op_type if node else value.name}")
    if not causal or not padding:
        raise NotRewritableError("a mask that is not causal")
    return window


def _conjuncts(value: ir.Value | None) -> Iterator[ir.Value]:
    """Yield the operands of And, seen through broadcasts."""
    node = None if value is None else value.producer()
    if value is None:
        return
    if node is not None and is_op(node, "And"):
        for item in node.inputs:
            yield from _conjuncts(item)
    elif node is not None and is_op(node, "Expand"):
        yield from _conjuncts(node.inputs[0])
    else:
        yield value


def _is_padding(value: ir.Value) -> bool:
    """Tell whether this is the attention mask, cast and with axes added."""
    node = value.producer()
    while node is not None and node.op_type in {"Unsqueeze", "Cast"}:
        source = node.inputs[0]
        if source is None:
            return False
        value, node = source, source.producer()
    return value.is_graph_input() and value.name == "attention_mask"


def _is_all_true(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size == 1 and bool(tensor.numpy().reshape(()))


def _position_tables(
    graph: ir.Graph, cosine: ir.Value, sine: ir.Value, positions: int
) -> tuple[ir.Value, ir.Value]:
    """Compute cosines and sines `[positions, D/2]` by the model's own nodes."""
    values = (cosine, sine)
    arrays = _compute_from_positions(graph, values, positions)
    shorter = _compute_from_positions(graph, values, positions // 2)
    made = []
    for value, array, part in zip(values, arrays, shorter, strict=True):
        if not np.array_equal(array[: positions // 2], part):
            raise NotRewritableError("rotary embeddings that depend on the length")
        made.append(add_initializer(graph, f"{value.name}.by_position", _tensor(array, value)))
    return made[0], made[1]


def _compute_from_positions(
    graph: ir.Graph, values: tuple[ir.Value, ...], positions: int
) -> list[NDArray[np.float32]]:
    """Evaluate the nodes for one sequence without a cache."""
    nodes = _ancestors(values)
    used = {value for node in nodes for value in node.inputs if value is not None}
    inputs = [value for value in graph.inputs if value in used]
    proto = _model_of(nodes, inputs, values)
    results: Any = ReferenceEvaluator(proto).run(
        None, {str(value.name): _example_of(value, positions) for value in inputs}
    )
    return [result[0] for result in results]


def _example_of(value: ir.Value, positions: int) -> NDArray[Any]:
    if value.name == "position_ids":
        return np.arange(positions, dtype=np.int64)[None]
    if value.dtype == ir.DataType.INT64:  # token ids, attention mask
        return np.ones((1, positions), np.int64)
    heads, size = (static_size(value, axis) or 0 for axis in (1, 3))
    return np.zeros((1, heads, 0, size), np.float32)  # a cache: its sizes alone are read


def _ancestors(ends: tuple[ir.Value, ...]) -> list[ir.Node]:
    """List the nodes that compute these values, in graph order."""
    needed: set[ir.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in needed:
            needed.add(node)
            waiting += [item for item in node.inputs if item is not None]
    graph = next(iter(needed)).graph
    return [node for node in graph or () if node in needed]


def _model_of(nodes: list[ir.Node], inputs: list[ir.Value], values: tuple[ir.Value, ...]) -> bytes:
    """Serialise a model of these nodes alone; half types become float32."""
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    protos = [ir.serde.serialize_node(node) for node in nodes]
    for proto in protos:
        for attribute in proto.attribute:
            if attribute.name == "to" and attribute.i in halves:
                attribute.i = TensorProto.FLOAT
    tensors = {}
    for value in (item for node in nodes for item in node.inputs if item is not None):
        if value.const_value is not None:
            array = value.const_value.numpy()
            is_half = value.dtype in {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
            tensors[str(value.name)] = array.astype(np.float32) if is_half else array
    integer, real = TensorProto.INT64, TensorProto.FLOAT
    graph = helper.make_graph(
        protos,
        "positions",
        [
            helper.make_tensor_value_info(
                str(v.name), integer if v.dtype == ir.DataType.INT64 else real, None
            )
            for v in inputs
        ],
        [helper.make_tensor_value_info(str(v.name), real, None) for v in values],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 23)]
    return bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())


def _tensor(array: NDArray[np.float32], value: ir.Value) -> ir.Tensor[Any]:
    dtype = value.dtype or ir.DataType.FLOAT
    return ir.Tensor(np.ascontiguousarray(array).astype(dtype.numpy()), dtype=dtype)
