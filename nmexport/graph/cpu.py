"""Rewrites a bfloat16 model for the CPU, where ONNX Runtime has few bfloat16 kernels.

Values between nodes become float32; what is large stays bfloat16, mapped from the file as it lies
there, and is widened where it is computed with:

    inputs, cache ──► Cast ──► standard nodes, float32 ──► Cast ──► logits, cache
                                   │            ▲
                                   ▼            │
                                  Cast ──► NMLinear, bfloat16 ──► Cast

Each bfloat16 value of the old graph is in the new one under its own name, in one of two types:

1. *Narrow*, still bfloat16: initializers, graph inputs and outputs, and what nodes make that have a
   bfloat16 kernel and read a weight: our ops, `Gather` and `Transpose` of an initializer, and a
   `Concat` that is a graph output, as caches are.
2. *Wide*, now float32: all else.

A node that needs the other type reads a Cast, one for all such nodes. So what is both an output and
read again is read as the output: a token's keys are the same to the step that makes them as to
those that find them in the cache, and a prompt in pieces gives the bits of the whole prompt.

Weights are never read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nmexport.errors import ArtifactError
from nmexport.graph.contract import check_version, op_contract

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WIDENED = "nmexport.widened"
"""Metadata key of a model that has bfloat16 inputs and outputs and computes in float32 between."""
_NARROW = TensorProto.BFLOAT16
_DOMAIN = op_contract().domain
_OPSET = op_contract().opset_version
# Attributes that name the type of a result or of the arithmetic.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "softmax_precision"})
_PIECES = frozenset({"Split", "Reshape", "Transpose"})  # of input 0: what makes values of a linear
_KEYS, _VALUES, _PAST_KEYS = 1, 2, 4  # places of Attention's inputs
_GROUP = 16  # channels of a group that is kept whole: no result depends on it
_MATRIX = 2  # axes


def widen_file(model: Path | bytes, *, has_native_ops: bool) -> bytes:
    """Rewrite a model as `widen` does, and serialise it; external data stays where it is.

    Raises:
        ArtifactError: if it cannot be read.
    """
    try:
        proto = (
            onnx.load_model_from_string(model)
            if isinstance(model, bytes)
            else onnx.load(model, load_external_data=False)
        )
    except Exception as error:  # protobuf's own errors, by backend
        raise ArtifactError(f"The model cannot be read: {error}", fix="export again") from error
    name = "The model" if isinstance(model, bytes) else str(model)
    check_version({entry.domain: entry.version for entry in proto.opset_import}, name)
    widen(proto, has_native_ops=has_native_ops)
    return bytes(proto.SerializeToString())


def widen(model: onnx.ModelProto, *, has_native_ops: bool) -> None:
    """Rewrite a bfloat16 model without its external data; in place.

    Names and types of inputs and outputs stay. A model that was rewritten before stays as it is.

    Args:
        model: The graph; weights that lie in other files are named, not read.
        has_native_ops: Whether the session has our ops. Then `x @ W + b` on a bfloat16 initializer
            W becomes an NMLinear that keeps every channel, and W is read as it is; otherwise ONNX
            Runtime widens W once, which takes twice W's bytes of memory.
    """
    if is_widened(model):
        return
    widening = _Widening(model, has_native_ops=has_native_ops)
    for node in list(model.graph.node):
        widening.rewrite(node)
    _replace(model.graph.node, widening.nodes)
    _replace(
        model.graph.value_info, [info for info in model.graph.value_info if not _is_narrow(info)]
    )
    model.metadata_props.add(key=WIDENED, value="1")


def is_widened(model: onnx.ModelProto) -> bool:
    """Tell whether a model was rewritten before."""
    return any(entry.key == WIDENED for entry in model.metadata_props)


def is_bfloat16(model: onnx.ModelProto) -> bool:
    """Tell whether a model has bfloat16 inputs or outputs."""
    return any(_is_narrow(value) for value in (*model.graph.input, *model.graph.output))


class _Widening:
    """One model's nodes, rewritten one after the other; rules in the module's docstring."""

    def __init__(self, model: onnx.ModelProto, *, has_native_ops: bool) -> None:
        graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self._model = model
        self._has_native_ops = has_native_ops
        self._floats = _float32_values(model)
        self._weights = {
            tensor.name: tensor for tensor in graph.initializer if tensor.data_type == _NARROW
        }
        self._turned: dict[str, str] = {}
        """The initializer behind each `Transpose` of one."""
        self._given = {value.name for value in graph.output if _is_narrow(value)}
        self._narrow = {*self._weights, *(value.name for value in graph.input if _is_narrow(value))}
        self._readers = _readers(graph)
        self._absorbed: set[str] = set()
        """Products that became one node with the Add of their bias."""
        self._made: set[str] = set()
        """Second forms of values that are there already."""
        self._exact: set[str] = set()
        """Float32 values whose elements are bfloat16's: widened ones, and pieces of those."""

    def rewrite(self, node: onnx.NodeProto) -> None:
        """Add to `nodes` what computes the node's values."""
        if node.domain == _DOMAIN:
            self._keep_ours(node)
        elif not self._absorbed.isdisjoint(node.input):
            return
        elif self._only_moves(node):
            self._keep(node)
        elif self._has_native_ops and self._is_linear(node):
            self._replace_by_linear(node)
        else:
            self._widen(node)

    # -- nodes that stay bfloat16 -----------------------------------------------------------------

    def _keep_ours(self, node: onnx.NodeProto) -> None:
        if node.input[0] in self._floats:  # a counter that looks into a model
            self.nodes.append(node)
            return
        node.input[0] = self._as_narrow(node.input[0])
        self._keep(node)

    def _only_moves(self, node: onnx.NodeProto) -> bool:
        """Tell whether the node only moves elements of a weight or an output; it has a kernel."""
        return (node.op_type in {"Gather", "Transpose"} and node.input[0] in self._weights) or (
            node.op_type == "Concat" and node.output[0] in self._given
        )

    def _keep(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Transpose":
            self._turned[node.output[0]] = node.input[0]
        if node.op_type == "Concat":
            _replace(node.input, [self._as_narrow(name) for name in node.input])
        self.nodes.append(node)
        self._narrow.update(node.output)

    # -- dense linears ----------------------------------------------------------------------------

    def _is_linear(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "MatMul" and self._channels(node.input[1]) is not None

    def _channels(self, name: str) -> int | None:
        """Return K of a weight `[K, O]`; None for other values."""
        stored = self._weights.get(self._turned.get(name, name))
        if stored is None or len(stored.dims) != _MATRIX:
            return None
        return int(stored.dims[1 if name in self._turned else 0])

    def _replace_by_linear(self, node: onnx.NodeProto) -> None:
        """Replace `x @ W` and its bias by one linear, which rounds once, as a sparse one does."""
        x, weight = node.input
        channels = self._channels(weight) or 1
        group = next(size for size in range(_GROUP, 0, -1) if channels % size == 0)
        bias, output = self._bias_behind(node.output[0])
        inputs = [self._as_narrow(x), weight, *bias]
        self.nodes.append(
            helper.make_node(
                "NMLinear", inputs, [output], name=node.name, domain=_DOMAIN, n=group, m=group
            )
        )
        self._narrow.add(output)
        if all(entry.domain != _DOMAIN for entry in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(_DOMAIN, _OPSET))

    def _bias_behind(self, product: str) -> tuple[list[str], str]:
        """Find the constant `[O]` that is added to a product, if any, and the result's name."""
        readers = self._readers.get(product, [])
        if len(readers) == 1 and readers[0].op_type == "Add" and product not in self._given:
            others = [name for name in readers[0].input if name in self._weights]
            if others and len(self._weights[others[0]].dims) == 1:
                self._absorbed.add(product)
                return others, readers[0].output[0]
        return [], product

    # -- nodes that become float32 ----------------------------------------------------------------

    def _widen(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Attention" and self._reads_narrow_cache(node):
            for place in (_KEYS, _VALUES):
                node.input[place] = self._as_cached(node.input[place])
        _replace(node.input, [self._as_wide(name) for name in node.input])
        for attribute in node.attribute:
            _widen_attribute(attribute)
        self.nodes.append(node)
        if node.op_type in _PIECES and node.input[0] in self._exact:
            self._exact.update(node.output)
        for place, name in enumerate(node.output):
            if name in self._given:
                node.output[place] = f"{name}/computed"
                self.nodes.append(_cast(node.output[place], name, TensorProto.BFLOAT16))
                self._narrow.add(name)

    def _reads_narrow_cache(self, node: onnx.NodeProto) -> bool:
        return len(node.input) > _PAST_KEYS and node.input[_PAST_KEYS] in self._narrow

    def _as_cached(self, name: str) -> str:
        """Round a value to the elements that a cache will hold, in float32."""
        if name in self._narrow or name in self._exact:
            return name
        return self._once(self._as_narrow(name), f"{name}/rounded", TensorProto.FLOAT)

    # -- both types of a value --------------------------------------------------------------------

    def _as_narrow(self, name: str) -> str:
        if name in self._narrow:
            return name
        return self._once(name, f"{name}/bfloat16", _NARROW)

    def _as_wide(self, name: str) -> str:
        if name not in self._narrow:
            return name
        wide, tensor = f"{name}/float32", self._weights.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            self._exact.add(wide)
            # Of a constant, the runtime computes the Cast when it loads.
            return self._once(name, wide, TensorProto.FLOAT)
        if wide not in self._made:
            self._made.add(wide)
            self._model.graph.initializer.append(_as_float32(tensor, wide))
        return wide

    def _once(self, source: str, result: str, to: int) -> str:
        """Cast a value under the name `result`, once, where it is first needed."""
        if result not in self._made:
            self._made.add(result)
            self.nodes.append(_cast(source, result, to))
        return result


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=result, to=to)


def _as_float32(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name)


def _widen_attribute(attribute: onnx.AttributeProto) -> None:
    if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == _NARROW:
        attribute.t.CopyFrom(_as_float32(attribute.t, attribute.t.name))
    elif attribute.name in _TYPE_ATTRIBUTES and attribute.i == _NARROW:
        attribute.i = TensorProto.FLOAT


def _is_narrow(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == _NARROW)


def _float32_values(model: onnx.ModelProto) -> frozenset[str]:
    """List the values that are float32 already."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    floats = {
        value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    return frozenset(floats)


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Replace the contents of a repeated field."""
    kept = list(items)
    del field[:]
    field.extend(kept)
