"""Turns the tracer's graph into the one that is shipped."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from nmexport.graph.fusions import FuseCachedAttention, FuseRotaryEmbedding
from nmexport.graph.matching import (
    int_attribute,
    is_op,
    rank,
    scalar,
    slice_of,
    static_size,
)

_INT32_MAX = 2**31 - 1

FOLDABLE = 16384
"""Elements of a constant that may be computed at export: norm weights yes, matrices no."""

_SHARED = 8
"""Elements up to which equal constants become one: shapes and scalars, never weights."""


class EliminateNoOps(ir.passes.InPlacePass):
    """Nodes that return their first input go.

    1. `x * 1`, `x + 0`: a scalar constant, and x of at least its rank.
    2. `Slice` from 0 to the end, `Transpose` that keeps the order, `Cast` to the type x has.
    3. `Concat` loses inputs that are empty along its axis, and goes where one is left.

    Requires: nothing. Ensures: same values bit for bit (`-0 + 0` apart), same outputs' names.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            modified |= _drop_empty_inputs(node)
            source = _find_passed_through(node)
            if source is None or node.outputs[0].is_graph_output():
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _find_passed_through(node: ir.Node) -> ir.Value | None:
    """Find the input that the node returns unchanged, if any."""
    if not node.inputs or node.domain not in {"", "ai.onnx"}:
        return None
    match node.op_type:
        case "Mul":
            return _neutral_operand(node, neutral=1)
        case "Add":
            return _neutral_operand(node, neutral=0)
        case "Slice" | "Transpose" | "Cast" | "Concat":
            return node.inputs[0] if _keeps_everything(node) else None
    return None


def _keeps_everything(node: ir.Node) -> bool:
    first = node.inputs[0]
    match node.op_type:
        case "Slice":
            part = slice_of(node.outputs[0])
            return part is not None and part[2] == 0 and _reaches_end(part[0], part[1], part[3])
        case "Transpose":
            order = node.attributes.get("perm")
            return order is not None and list(order.as_ints()) == sorted(order.as_ints())
        case "Cast":
            return first is not None and first.dtype == int_attribute(node, "to", 0)
    return len(node.inputs) == 1


def _neutral_operand(node: ir.Node, *, neutral: int) -> ir.Value | None:
    for value, other in (node.inputs, node.inputs[::-1]):
        if value is None or other is None or scalar(other) != neutral:
            continue
        ranks = rank(value), rank(other)
        if ranks[0] is not None and ranks[1] is not None and ranks[1] <= ranks[0]:
            return value
    return None


def _reaches_end(data: ir.Value, axis: int, end: int) -> bool:
    size = static_size(data, axis)
    return end >= _INT32_MAX if size is None else end >= size


def _drop_empty_inputs(node: ir.Node) -> bool:
    if not is_op(node, "Concat"):
        return False
    axis = int_attribute(node, "axis", 0)
    full = [value for value in node.inputs if static_size(value, axis) != 0]
    if len(full) in {0, len(node.inputs)}:
        return False
    for index, value in enumerate(full):
        node.replace_input_with(index, value)
    node.resize_inputs(len(full))
    return True


class TransposeWeights(ir.passes.InPlacePass):
    """A matrix that is only ever read transposed is stored transposed.

    1. `Transpose(w, perm=[1, 0])` of an initializer that nothing else reads goes; w is turned when
       it is written.
    2. One that something else reads, as tied embeddings are, stays: runtimes fold the Transpose
       when they load, and the file holds the matrix once.

    Requires: nothing. Ensures: same values bit for bit, no more bytes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            weight = node.inputs[0] if is_op(node, "Transpose") else None
            if weight is None or not _is_turned_matrix(node, weight):
                continue
            weight.const_value = _transpose_later(weight.const_value, weight.name)
            weight.shape = node.outputs[0].shape = ir.Shape(list(weight.shape or ())[::-1])
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_turned_matrix(node: ir.Node, weight: ir.Value) -> bool:
    order = node.attributes.get("perm")
    return (
        order is not None
        and list(order.as_ints()) == [1, 0]
        and weight.is_initializer()
        and len(weight.uses()) == 1
        and not node.outputs[0].is_graph_output()
    )


def _transpose_later(tensor: ir.TensorProtocol | None, name: str | None) -> ir.LazyTensor:
    if tensor is None:
        raise ir.passes.PreconditionError(f"initializer {name} has no value")
    rows, columns = tensor.shape.numpy()
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape([columns, rows]),
        name=name,
    )


class NormalizeInOneType(ir.passes.InPlacePass):
    """`RMSNormalization` reads x in the type of its scale.

    The standard lets both differ, and the operator's own function body does not: it multiplies
    them. Where a model normalises and scales in float32 (Gemma), x is cast first, as it was before
    the nodes were fused.

    Requires: x and scale of known types. Ensures: same values; the result has the scale's type.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if not is_op(node, "RMSNormalization"):
                continue
            x, scale = node.inputs[:2]
            if x is None or scale is None or x.dtype == scale.dtype or scale.dtype is None:
                continue
            cast = ir.node("Cast", [x], {"to": scale.dtype})
            cast.outputs[0].name = f"{node.outputs[0].name}.input"
            cast.outputs[0].shape, cast.outputs[0].type = x.shape, ir.TensorType(scale.dtype)
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])
            node.outputs[0].type = ir.TensorType(scale.dtype)
            modified = True
        return ir.passes.PassResult(model, modified)


def optimise(model: ir.Model) -> None:
    """Clean the traced graph and fuse what pays, in place.

    Every op stays standard or ours, every value the same within rounding, and equal traces give
    equal graphs.
    """
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter.rules.fusion import _rms_normalization

    # Constants first: all passes below look for them among the initializers.
    common.ClearMetadataAndDocStringPass()(model)
    common.IdentityEliminationPass()(model)
    fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=FOLDABLE,
        output_size_limit=FOLDABLE,
        should_fold=lambda node: None if _is_small(node) else False,
    )
    common.RemoveUnusedNodesPass()(model)  # what folding left would be lifted too
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass(size_limit=_SHARED)(model)
    # Then one node for one value: no-ops, transposes and repetitions hide the patterns of fusions.
    EliminateNoOps()(model)
    TransposeWeights()(model)
    common.CommonSubexpressionEliminationPass()(model)
    # Fusions last. Attention is flattened through the rotary embedding, so that is fused before it.
    # Both want a value's only user, so nodes that a fusion left unused go in between.
    _rms_normalization.rms_normalization_ruleset.apply_to_model(model)
    NormalizeInOneType()(model)
    FuseRotaryEmbedding()(model)
    common.RemoveUnusedNodesPass()(model)
    FuseCachedAttention()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    model.graph.sort()


def _is_small(node: ir.Node) -> bool:
    """Tell whether all constants of the node may be folded: the tracer's default folds matrices."""
    constants = [value.const_value for value in node.inputs if value is not None]
    return all(tensor is None or tensor.size <= FOLDABLE for tensor in constants)
