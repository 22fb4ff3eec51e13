"""Attention for ONNX Runtime's CUDA provider: grouped heads, the cache in place, rotary inside."""

from __future__ import annotations

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

CONTRIB = "com.microsoft"
LAST_POSITIONS = "last_positions"
TOTAL_LENGTH = "total_sequence_length"

_MASK, _PAST_KEYS, _PAST_VALUES = 3, 4, 5  # places of Attention's inputs
_HEAD_UNIT = 8
"""The provider's attention kernels want head sizes that are multiples of this."""
_LARGEST_HEAD = 256
_SWAP = [0, 2, 1, 3]
"""Between `[B, S, H, D]` and `[B, H, S, D]`."""


class NotRewritableError(Exception):
    """This graph has a form that no rule takes; the exported file runs in its place."""


class ReplaceAttention(ir.passes.InPlacePass):
    """Every `Attention` over a cache becomes `GroupQueryAttention` with the cache in place.

    1. Its mask is causal, or causal within a window, and hides padding; nothing else.
    2. Queries and keys are rotary embeddings by the model's positions, or neither is.
    3. Queries, keys and values that one Split takes from a packed product stay packed.

    Requires: exported by this package; float16, bfloat16, or float32 (which only the CPU provider
    computes: for tests). Ensures: same values within rounding.
    """

    def __init__(self, positions: int) -> None:
        """Make rotary tables for so many positions."""
        super().__init__()
        self._positions = positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        nodes = [node for node in graph if is_op(node, "Attention")]
        if not nodes:
            raise NotRewritableError("no attention node of a known form")
        lengths = _add_length_inputs(graph)
        tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]] = {}
        for node in nodes:
            _replace_attention(graph, node, lengths, tables, self._positions)
        for value in graph.inputs:
            if value.name and value.name.startswith("past_key_values."):
                _rename_axis(value, "capacity")
        for value in graph.outputs:
            if value.name and value.name.startswith("present."):
                _rename_axis(value, "capacity")
        model.graph.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified=True)


def _add_length_inputs(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    last = ir.val(LAST_POSITIONS, dtype=ir.DataType.INT32, shape=["batch_size"])
    total = ir.val(TOTAL_LENGTH, dtype=ir.DataType.INT32, shape=[])
    graph.inputs.extend([last, total])
    return last, total


def _replace_attention(
    graph: ir.Graph,
    node: ir.Node,
    lengths: tuple[ir.Value, ir.Value],
    tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]],
    positions: int,
) -> None:
    if len(node.inputs) <= _PAST_VALUES:
        raise NotRewritableError(f"attention {node.name} has no cache")
    past = node.inputs[_PAST_KEYS]
    _check_head_size(past)
    heads = _head_counts(node)
    window = _window_of(node.inputs[_MASK])
    rotaries = [made_by(value, "RotaryEmbedding") for value in node.inputs[:2]]
    caches: tuple[ir.Value | None, ir.Value | None] = (None, None)
    sources = list(node.inputs[:3])
    if rotaries[0] is not None and rotaries[1] is not None:
        cosine, sine = rotaries[0].inputs[1:3]
        if cosine is None or sine is None or list(rotaries[1].inputs[1:3]) != [cosine, sine]:
            raise NotRewritableError("queries and keys are turned by different tables")
        if any(int_attribute(rotary, "interleaved", 0) for rotary in rotaries if rotary):
            raise NotRewritableError("interleaved rotary embedding")
        if (cosine, sine) not in tables:
            tables[cosine, sine] = _position_tables(graph, cosine, sine, positions)
        caches = tables[cosine, sine]
        sources[:2] = [rotaries[0].inputs[0], rotaries[1].inputs[0]]
    elif rotaries != [None, None]:
        raise NotRewritableError("only one of queries and keys is turned by position")
    has_head_axis = "q_num_heads" not in node.attributes
    if has_head_axis:
        sources = [_join_heads(graph, node, value) for value in sources]
    packed = _match_packed_source(sources)
    attributes: list[ir.Attr] = [
        ir.AttrInt64("num_heads", heads[0]),
        ir.AttrInt64("kv_num_heads", heads[1]),
        ir.AttrInt64("do_rotary", int(caches[0] is not None)),
        ir.AttrInt64("local_window_size", window),
    ]
    if "scale" in node.attributes:
        attributes.append(ir.AttrFloat32("scale", node.attributes["scale"].as_float()))
    fused = ir.Node(
        CONTRIB,
        "GroupQueryAttention",
        [
            *([packed, None, None] if packed is not None else sources),
            past,
            node.inputs[_PAST_VALUES],
            *lengths,
            *caches,
        ],
        attributes,
        num_outputs=3,
        name=node.name,
    )
    if has_head_axis:
        end = _match_joined_result(node)
        outputs = [end[-1].outputs[0], *node.outputs[1:]]
        take_place(graph, [*reversed(end), node], fused, outputs, at=node)
    else:
        take_place(graph, [node], fused, node.outputs)


def _head_counts(node: ir.Node) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
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
    """The Transpose and Reshape to `[B, S, H * D]` that follow the node."""
    transpose = only_use(node.outputs[0], "Transpose")
    reshape = None if transpose is None else only_use(transpose.outputs[0], "Reshape")
    if transpose is None or reshape is None or rank(reshape.outputs[0]) != 3:  # noqa: PLR2004
        raise NotRewritableError("an attention result that is not joined again")
    return transpose, reshape


def _check_head_size(past: ir.Value | None) -> None:
    size = static_size(past, 3)
    if past is None or size is None or size % _HEAD_UNIT or size > _LARGEST_HEAD:
        raise NotRewritableError(f"head size {size}")


def _match_packed_source(sources: list[ir.Value | None]) -> ir.Value | None:
    """The value that one Split takes apart into exactly these three, in order."""
    splits = {source.producer() for source in sources if source is not None}
    split = splits.pop()
    is_split = not splits and split is not None and is_op(split, "Split")
    return split.inputs[0] if is_split and split and list(split.outputs) == sources else None


def _window_of(mask: ir.Value | None) -> int:
    """Positions that a token sees, itself included; -1 where it sees all before it.

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
    """Tell whether this is the attention mask, cast and given axes."""
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
    """Cosines and sines `[positions, D/2]`, computed by the model's own nodes."""
    values = (cosine, sine)
    arrays = _computed_from_positions(graph, values, positions)
    shorter = _computed_from_positions(graph, values, positions // 2)
    made = []
    for value, array, part in zip(values, arrays, shorter, strict=True):
        if not np.array_equal(array[: positions // 2], part):
            raise NotRewritableError("rotary embeddings that depend on the length")
        made.append(add_initializer(graph, f"{value.name}.by_position", _tensor(array, value)))
    return made[0], made[1]


def _computed_from_positions(
    graph: ir.Graph, values: tuple[ir.Value, ...], positions: int
) -> list[NDArray[np.float32]]:
    """Evaluate the nodes for one sequence of so many tokens and no cache."""
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
    """The nodes that compute these values, in graph order."""
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
    """A serialised model of these nodes alone; half types become float32."""
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


def _rename_axis(value: ir.Value, name: str) -> None:
    if value.shape is not None:
        shape = list(value.shape)
        shape[2] = ir.SymbolicDim(name)
        value.shape = ir.Shape(shape)
