"""Rows that are pruned where they are made, for ONNX Runtime's CUDA provider.

A sparse linear gathers its X by the channel order, ranks it and drops what the pattern drops. Done
by each linear, that is work of every block of a decode kernel, and a pass over memory for prompts.
The kernel in front, a norm or a gated activation, has the row in its hands:

    ResidualNorm ──► NMLinear 8:16          becomes      PrunedResidualNorm ──► SparseLinear

Both keep the linear's phase: tokens that it leaves dense are gathered alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from nmexport.graph.contract import op_contract
from nmexport.graph.functions import (
    Signature,
    addend_steps,
    is_dense_steps,
    prune_steps,
    weight_steps,
)
from nmexport.graph.fused import FUSED, add_function
from nmexport.graph.matching import int_attribute, static_size
from nmexport.graph.rewriting import take_place
from nmexport.graph.versions import OPSET

_DOMAIN = op_contract().domain
_INPUTS = [spec.name for spec in op_contract().ops["NMLinear"].inputs]
_SELECTION = ("score_scale", "channel_order", "value_scale", "shift")
"""Inputs of a linear that the kernel in front takes over, in this order."""
_PRODUCT = ("X", "W", "bias", "weight_scale", "weight_zero_point", "dense_bias")
"""Inputs that stay with the linear, in the order of `SparseLinear`."""
_OPTIONAL = _PRODUCT[2:]
_PRODUCERS = frozenset({"ResidualNorm", "GatedSilu", "GatedSiluPair"})
_GROUP = 16
_MOST_CHANNELS = 16384
"""A row lies in a block's shared memory, twice: see `kMAX_PRUNED_CHANNELS` of the kernels."""
_HEADER = f'<opset_import: ["" : {OPSET}, "{FUSED}" : 1], domain: "{FUSED}">\n'


@dataclass(frozen=True)
class _Selection:
    """Pattern and constants by which a row is pruned."""

    n: int
    phase: str
    constants: tuple[ir.Value | None, ...]
    """Those of `_SELECTION`."""

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the constants that there are."""
        pairs = zip(_SELECTION, self.constants, strict=True)
        return tuple(name for name, value in pairs if value is not None)


class PruneWhereMade(ir.passes.InPlacePass):
    """Sparse linears behind a norm or a gated activation take rows that are pruned already.

    1. All readers of the row are `NMLinear` of one selection, in groups of 16, without a statistic
       of the token: the producer becomes its pruned form, and each reader a `SparseLinear`.

    Requires: `FuseResidualNorm` and `FuseGatedSilu` have run. Ensures: the same channels are kept;
    same values within rounding.
    """

    def __init__(self, types: frozenset[ir.DataType]) -> None:
        """Change rows of some types alone."""
        super().__init__()
        self._types = types

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            selection = self._selection_behind(node)
            if selection is not None:
                _prune(model, node, selection)
                modified = True
        return ir.passes.PassResult(model, modified)

    def _selection_behind(self, node: ir.Node) -> _Selection | None:
        """The one selection of all linears that read the node's first output."""
        if node.domain != FUSED or node.op_type not in _PRODUCERS:
            return None
        row = node.outputs[0]
        width = static_size(row, -1)
        fits = width is not None and width % _GROUP == 0 and width <= _MOST_CHANNELS
        if row.dtype not in self._types or row.is_graph_output() or not fits:
            return None
        selections = {_selection_of(use.node) if use.idx == 0 else None for use in row.uses()}
        return selections.pop() if len(selections) == 1 else None


def _selection_of(node: ir.Node) -> _Selection | None:
    """The selection of an `NMLinear`; None where its row cannot be pruned beforehand."""
    if node.domain != _DOMAIN or node.op_type != "NMLinear":
        return None
    n, m = int_attribute(node, "n", 0), int_attribute(node, "m", 0)
    is_plain = (
        m == _GROUP
        and n < m
        and not int_attribute(node, "dynamic_shift", 0)
        and not int_attribute(node, "variance_correction", 0)
        and not int_attribute(node, "activation_bits", 0)
    )
    given = dict(zip(_INPUTS, node.inputs, strict=False))
    taken = {*_SELECTION, *_PRODUCT}
    others = any(value is not None for name, value in given.items() if name not in taken)
    constants = tuple(given.get(name) for name in _SELECTION)
    if not is_plain or others or any(v is not None and not v.is_initializer() for v in constants):
        return None
    return _Selection(n, _phase_of(node), constants)


def _phase_of(node: ir.Node) -> str:
    phase = node.attributes.get("phase")
    return "all" if phase is None else phase.as_string()


def _prune(model: ir.Model, node: ir.Node, selection: _Selection) -> None:
    readers = [use.node for use in node.outputs[0].uses()]
    pattern = [
        ir.AttrInt64("n", selection.n),
        ir.AttrInt64("m", _GROUP),
        ir.AttrString("phase", selection.phase),
    ]
    pruned = ir.Node(
        FUSED,
        f"Pruned{node.op_type}",
        [*node.inputs, *selection.constants],
        [*node.attributes.values(), *pattern],
        overload=Signature(
            op_type="NMPrune", optional_inputs=selection.present, phase=selection.phase
        ).overload,
        num_outputs=len(node.outputs),
        name=node.name,
    )
    take_place(model.graph, [node], pruned, node.outputs)
    _add_pruned_function(model, node, pruned.overload, selection)
    for reader in readers:
        _multiply_kept_rows(model, reader)


def _multiply_kept_rows(model: ir.Model, node: ir.Node) -> None:
    given = dict(zip(_INPUTS, node.inputs, strict=False))
    present = tuple(name for name in _OPTIONAL if given.get(name) is not None)
    inputs = [given.get(name) for name in _PRODUCT]
    while inputs[-1] is None:
        inputs.pop()
    signature = Signature(op_type="NMLinear", optional_inputs=present, phase=_phase_of(node))
    linear = ir.Node(
        FUSED,
        "SparseLinear",
        inputs,
        [ir.AttrString("phase", signature.phase)],
        overload=signature.overload,
        name=node.name,
    )
    linear.metadata_props.update(node.metadata_props)
    take_place(model.graph, [node], linear, node.outputs)
    _add_sparse_linear(model, signature)


def _add_sparse_linear(model: ir.Model, signature: Signature) -> None:
    """A body of: the product with W, dequantised where it is stored, and a bias, in float32."""
    has_bias = signature.has("bias") or signature.has("dense_bias")
    steps = [
        *weight_steps(signature),
        "operand = Cast <to: int = 1> (S)",
        "product = MatMul (operand, w)",
    ]
    if has_bias and signature.phase != "all":
        steps += is_dense_steps(signature.phase, "S")
    if has_bias:
        steps += [*addend_steps(signature), "total = Add (product, addend)"]
    steps.append(f"Y = CastLike ({'total' if has_bias else 'product'}, S)")
    body = "{\n" + "\n".join(steps) + "\n}"
    header = f"SparseLinear <phase> ({', '.join(['S', 'W', *_OPTIONAL])}) => (Y)"
    add_function(model, f"{_HEADER}{header} {body}", overload=signature.overload)


def _add_pruned_function(
    model: ir.Model, node: ir.Node, overload: str, selection: _Selection
) -> None:
    """A body of: the op as it is, gathered, shifted, pruned, scaled; or gathered alone."""
    present = selection.present
    own = [f"own{index}" for index in range(len(node.inputs))]
    rows = ["row", *(f"other{index}" for index in range(1, len(node.outputs)))]
    attributes = [*node.attributes]
    passed = ", ".join(f"{name}: float = @{name}" for name in attributes)
    call = f"{FUSED}.{node.op_type}" + (f" <{passed}>" if passed else "")
    prune = Signature(op_type="NMPrune", optional_inputs=tuple({"score_scale"} & set(present)))
    is_gated = selection.phase != "all"
    steps = [
        f"{', '.join(rows)} = {call} ({', '.join(own)})",
        "by_position = Gather <axis: int = -1> (row, channel_order)"
        if "channel_order" in present
        else "by_position = Identity (row)",
        "activation = Cast <to: int = 1> (by_position)",
        "X = Sub (activation, shift)" if "shift" in present else "X = Identity (activation)",
        *prune_steps(prune),
        "values = Mul (Y, value_scale)" if "value_scale" in present else "values = Identity (Y)",
        *(is_dense_steps(selection.phase, "row") if is_gated else []),
        "chosen = Where (is_dense, activation, values)"
        if is_gated
        else "chosen = Identity (values)",
        "pruned = CastLike (chosen, row)",
    ]
    constants = [name if name in present else f"no_{name}" for name in _SELECTION]
    header = (
        f"Pruned{node.op_type} <{', '.join([*attributes, 'n', 'm', 'phase'])}> "
        f"({', '.join([*own, *constants])}) => ({', '.join(['pruned', *rows[1:]])})"
    )
    body = "{\n" + "\n".join(steps) + "\n}"
    add_function(model, f"{_HEADER}{header} {body}", overload=overload)
    model.graph.opset_imports.setdefault(_DOMAIN, op_contract().opset_version)
