"""Changes an exported graph in memory for TensorRT's parser; the file stays as it is.

Three things: an optional input that a node leaves out is dropped and named, as TensorRT knows no
absent input; attention returns nothing but its result, so the cache is updated next to it; and the
cache is updated in place where it can be, so that a decode step moves one token and not the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import onnx_ir as ir

from nmexport.graph.contract import check_version, op_contract
from nmexport.graph.initializers import add_constant
from nmexport.graph.matching import int_attribute, is_op
from nmexport.graph.rewriting import replace_node, replace_uses
from nmexport.graph.separate_cache import ATTENTION_OP, separate_cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from nmexport.graph.separate_cache import Update


PRESENT_INPUTS = "present_inputs"
"""Attribute of our nodes, for TensorRT alone: names of the inputs they have."""
PLUGIN_VERSION = "plugin_version"
"""Attribute by which TensorRT's parser looks a plugin up; without it, it looks for version 1."""
SCATTER_OP = "TensorScatter"
"""Operator that not every version's parser knows, as is `ATTENTION_OP`."""
WRITE_INDICES = "write_indices"
"""Graph input `[batch_size] int64`: tokens in the cache before this run, one number for all."""
_PAST = "past_key_values."
_MASK = "attention_mask"
_CACHE_AXIS = 2
_SCATTER_OPSET = 24
# Ops through which a size may pass on its way from Shape to where it is used.
_SIZE_OPS = frozenset({"Squeeze", "Unsqueeze", "Cast", "Identity", "Reshape"})
# Inputs that decide a shape: none may come from the data of a run.
_SHAPE_INPUTS = {
    "Range": (0, 1, 2),
    "Expand": (1,),
    "Reshape": (1,),
    "ConstantOfShape": (0,),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
}


@dataclass(frozen=True)
class Rewritten:
    """A graph for TensorRT's parser."""

    model: ir.Model
    """Weights are still where they were: external, or in memory."""
    in_place: bool
    """The cache is updated in place: `past` and `present` are one buffer of fixed capacity."""
    why_not_in_place: str | None
    fused_attention: int
    """Attention nodes."""


def for_tensorrt(path: Path, *, capacity: int | None, why_no_capacity: str = "") -> Rewritten:
    """Read an exported model and change what TensorRT's parser needs changed.

    Args:
        path: `model.onnx`; its weights are not read.
        capacity: Tokens that the cache holds, for an update in place; None: the cache grows.
        why_no_capacity: Why the cache cannot be updated in place, where that is known.
    """
    model = ir.load(path)
    check_version(model.graph.opset_imports, str(path))
    why: str | None = why_no_capacity or "not asked for"
    if capacity is not None:
        try:
            CacheInPlace(capacity)(model)
            why = None
        except ir.passes.PreconditionError as error:
            model, why = ir.load(path), str(error)
    passes = [ConcatenateCache(), NamePresentInputs()]
    for rewrite in passes:
        rewrite(model)
    model.functions.clear()  # the plugin runs in their place
    attention = sum(is_op(node, ATTENTION_OP) for node in model.graph)
    return Rewritten(model, why is None, why, attention)


class NamePresentInputs(ir.passes.InPlacePass):
    """Our nodes drop absent inputs, name the present ones and say which plugin they need.

    Requires: nodes as the op contract has them. Ensures: no node of our domain has an empty input.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite all nodes of our domain."""
        contract = op_contract()
        modified = False
        for node in model.graph:
            if node.domain != contract.domain:
                continue
            spec = contract.ops[node.op_type]
            present = [
                (entry.name, value)
                for entry, value in zip(spec.inputs, node.inputs, strict=False)
                if value is not None
            ]
            node.resize_inputs(len(present))
            for index, (_, value) in enumerate(present):
                node.replace_input_with(index, value)
            names = ",".join(name for name, _ in present)
            node.attributes[PRESENT_INPUTS] = ir.AttrString(PRESENT_INPUTS, names)
            node.attributes[PLUGIN_VERSION] = ir.AttrString(PLUGIN_VERSION, contract.plugin_version)
            modified = True
        return ir.passes.PassResult(model, modified)


class ConcatenateCache(ir.passes.InPlacePass):
    """Attention's own cache becomes a Concat before it.

    Requires: opset 23. Ensures: every Attention node has one output and inputs of rank 4.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Attention node that has a cache."""

        def concat(past: ir.Value, new: ir.Value) -> ir.Node:
            return ir.node("Concat", [past, new], {"axis": _CACHE_AXIS})

        return ir.passes.PassResult(model, separate_cache(model, concat))


class CacheInPlace(ir.passes.InPlacePass):
    """The cache becomes a buffer of fixed capacity that each run writes its new tokens into.

    1. `past.*` and `present.*` are `[B, H, C, D]`, `attention_mask` is `[B, C]`, 0 where nothing is
       yet. A new input `write_indices [B]` says how many tokens there are before this run.
    2. `Concat(past, new)`, or Attention's own cache, becomes `TensorScatter(past, new,
       write_indices)`, which runtimes do in place where both names are one buffer.
    3. The past length, which was the size of `past`, is read from `write_indices`; the total
       length, past and new, is C. Slots beyond the last token are masked, as they come after every
       token in order.

    Requires: `past` is used by nothing but its Concat or Attention and by Shape. Ensures: no shape
    in the graph depends on the data of a run.
    """

    def __init__(self, capacity: int) -> None:
        """Hold `capacity` tokens."""
        super().__init__()
        self._capacity = capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the whole graph.

        Raises:
            onnx_ir.passes.PreconditionError: where the graph uses its cache in another way; the
                model is half rewritten then.
        """
        graph = model.graph
        past = [value for value in graph.inputs if (value.name or "").startswith(_PAST)]
        if not past:
            raise ir.passes.PreconditionError("the graph has no cache")
        model.graph.opset_imports[""] = _SCATTER_OPSET
        written = ir.Value(
            name=WRITE_INDICES,
            shape=ir.Shape(["batch_size"]),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.inputs.append(written)
        self._fix_sizes(graph, past)
        self._replace_lengths(graph, past, written)

        def scatter(cache: ir.Value, new: ir.Value) -> ir.Node:
            return ir.node(SCATTER_OP, [cache, new, written], {"axis": _CACHE_AXIS})

        _replace_concats(model, past, scatter)
        separate_cache(model, scatter)
        _check_past_uses(past)
        _check_static_shapes(written)
        return ir.passes.PassResult(model, modified=True)

    def _fix_sizes(self, graph: ir.Graph, past: Iterable[ir.Value]) -> None:
        presents = [v for v in graph.outputs if (v.name or "").startswith("present.")]
        for value in (*past, *presents):
            if value.shape is not None:
                sizes = list(value.shape)
                sizes[_CACHE_AXIS] = self._capacity
                value.shape = ir.Shape(sizes)
        for value in graph.inputs:
            if value.name == _MASK and value.shape is not None:
                value.shape = ir.Shape([value.shape[0], self._capacity])

    def _replace_lengths(
        self, graph: ir.Graph, past: Iterable[ir.Value], written: ir.Value
    ) -> None:
        """Read past lengths from `written`; sums of past and new length become the capacity."""
        lengths = [node for value in past for node in _cache_length_shapes(value)]
        if not lengths:
            return
        zero, one = (add_constant(graph, f"{WRITE_INDICES}.{n}", [n]) for n in (0, 1))
        first = ir.node("Slice", [written, zero, one, zero])  # [1]: the same for every sequence
        first.outputs[0].name = f"{WRITE_INDICES}.first"
        graph.insert_before(graph[0], first)
        totals = {
            id(add): add
            for shape in lengths
            for size in _sizes_from(shape.outputs[0])
            for add in _sums_with_a_size(size)
        }
        for index, add in enumerate(totals.values()):
            rank = 0 if add.outputs[0].shape is None else len(add.outputs[0].shape)
            value = self._capacity if rank == 0 else [self._capacity]
            total = add_constant(graph, f"total_sequence_length.{index}", value)
            replace_uses(add.outputs[0], total)
            graph.remove(add, safe=True)
        for shape in lengths:
            for usage in list(shape.outputs[0].uses()):
                _squeeze_first_axis(usage.node, zero)
            replace_uses(shape.outputs[0], first.outputs[0])
            graph.remove(shape, safe=True)


def _squeeze_first_axis(node: ir.Node, zero: ir.Value) -> None:
    """Name the axis that a Squeeze drops: for data, TensorRT needs it."""
    if is_op(node, "Squeeze") and len(node.inputs) == 1:
        node.resize_inputs(2)
        node.replace_input_with(1, zero)


def _cache_length_shapes(past: ir.Value) -> Iterator[ir.Node]:
    """Yield Shape nodes that give only the length of a cache.

    Raises:
        onnx_ir.passes.PreconditionError: where one gives it among other sizes.
    """
    for usage in list(past.uses()):
        if not is_op(usage.node, "Shape"):
            continue
        start = int_attribute(usage.node, "start", 0)
        end = int_attribute(usage.node, "end", 4)
        if (start, end) == (_CACHE_AXIS, _CACHE_AXIS + 1):
            yield usage.node
        elif start <= _CACHE_AXIS < end:
            raise ir.passes.PreconditionError(f"{usage.node.name} reads {past.name}'s whole shape")


def _sizes_from(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the value, and what changes of rank or type make of it."""
    yield value
    for usage in value.uses():
        if usage.idx == 0 and usage.node.op_type in _SIZE_OPS:
            yield from _sizes_from(usage.node.outputs[0])


def _sums_with_a_size(value: ir.Value) -> Iterator[ir.Node]:
    """Yield Adds of the value and another size of a tensor."""
    for usage in value.uses():
        if is_op(usage.node, "Add"):
            other = usage.node.inputs[1 - usage.idx]
            if other is not None and _is_size(other):
                yield usage.node


def _is_size(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.op_type in _SIZE_OPS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and is_op(node, "Shape")


def _replace_concats(model: ir.Model, past: Iterable[ir.Value], update: Update) -> None:
    """Replace `Concat(past, new)` on the cache axis by the update."""
    for value in past:
        for usage in list(value.uses()):
            node = usage.node
            is_cache = is_op(node, "Concat") and int_attribute(node, "axis", 0) in {
                _CACHE_AXIS,
                _CACHE_AXIS - 4,
            }
            if not is_cache or usage.idx != 0 or len(node.inputs) != 2:  # noqa: PLR2004
                continue
            new = node.inputs[1]
            if new is not None:
                replace_node(model.graph, node, update(value, new))


def _check_past_uses(past: Iterable[ir.Value]) -> None:
    for value in past:
        others = {
            usage.node.op_type
            for usage in value.uses()
            if usage.node.op_type not in {SCATTER_OP, "Shape"}
        }
        if others:
            raise ir.passes.PreconditionError(f"{value.name} is used by {', '.join(others)}")


def _check_static_shapes(written: ir.Value) -> None:
    """Follow the number of cached tokens through arithmetic, to where it is compared or written.

    Raises:
        onnx_ir.passes.PreconditionError: where it would decide a shape.
    """
    waiting, seen = [written], set()
    while waiting:
        value = waiting.pop()
        for usage in value.uses():
            node = usage.node
            if usage.idx in _SHAPE_INPUTS.get(node.op_type, ()):
                raise ir.passes.PreconditionError(
                    f"{node.op_type} {node.name} makes a shape from the number of cached tokens"
                )
            stops = {"LessOrEqual", "Less", "Greater", "GreaterOrEqual", SCATTER_OP}
            if node.op_type not in stops and id(node) not in seen:
                seen.add(id(node))
                waiting.extend(node.outputs)
