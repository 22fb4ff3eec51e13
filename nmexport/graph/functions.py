"""Function bodies: both ops in standard ONNX operators, for runtimes without our native code.

One node, two lives
    A sparsified linear is one node `nmexport::NMLinear`. A runtime that has an implementation of
    that op registered uses it; any other runs the body given here, which travels in the model as a
    model-local function.

Which body
    An ONNX function cannot ask whether an optional input is present, and an `If` on an attribute
    would stay in the hot path. So a body is written for exactly the inputs and attributes a node
    has, its `Signature`. Where all nodes of an op in a model share one signature, as they mostly
    do, the function is a plain one; where they do not, each signature becomes an *overload* (ONNX
    IR version 10), and a node names its own in `overload`. ONNX Runtime honours overloads without
    the native library, and prefers a registered custom op to every overload with it.

For who assembles a model
    `function_protos_for(nodes)` returns the functions to add and sets `overload` on the nodes.
    The model needs IR version `IR_VERSION`, and opset imports of the default domain (`opset`) and
    of ours (`op_contract().domain`, `op_contract().opset_version`). `functions_for(signatures)`
    does the same for who holds no NodeProto: take the overload from a signature's function.

Stored weights
    Widened, and less zero points, times scales. `DequantizeLinear` in front of a product says the
    same, but ONNX Runtime takes the two for leave to round the product's other operand to 8 bits,
    which is an attribute of ours. With this form it computes the weight once, when it loads.

Operands in 8 bits
    Rounded, and multiplied by their scale again: the product is one of floats, whose sums round.

Channel orders
    NMLinear gathers X first; from there on it is the op without an order. NMPrune, whose result
    lies in X's own order, gathers what it selects on and puts the mask back.

How the mask stays exact
    `TopK` prefers the lower index among equals, as the contract does, but leaves NaN undefined. So
    scores, computed in float32 as everywhere, are widened to float64, where there is room above
    float32's infinity: NaN becomes infinity, and infinity a number that no float32 reaches.
    All arithmetic is float32 and the result is cast back to T at the end, because runtimes lack
    many float16 and bfloat16 kernels on a CPU. ONNX Runtime's `Where` may turn a kept -0 into +0,
    which compares equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx

from nmexport.graph.contract import attribute_values, check_node, op_contract, present_inputs
from nmexport.graph.versions import OPSET

if TYPE_CHECKING:
    from collections.abc import Iterable

_LEVELS = 127  # op contract: an operand in 8 bits lies between this and its negative
_ABOVE_FLOAT32 = "1e300"  # float64: above any float32 score, below infinity


@dataclass(frozen=True, order=True, kw_only=True)
class Signature:
    """The properties of a node that decide its function body."""

    op_type: Literal["NMPrune", "NMLinear"]
    optional_inputs: tuple[str, ...] = ()
    """Optional inputs that are present, in contract order."""
    keeps_all: bool = False
    """n == m: nothing to select."""
    dynamic_shift: bool = False
    variance_correction: bool = False
    phase: str = "all"
    activation_block: int = 0
    """Channels of a block of an operand in 8 bits; 0 where it stays float."""

    def has(self, name: str) -> bool:
        """Tell whether an optional input is present."""
        return name in self.optional_inputs

    @property
    def overload(self) -> str:
        """A name that says what the body handles, such as `bias_score_scale_decode`."""
        parts = [*self.optional_inputs]
        parts += [name for name in ("dynamic_shift", "variance_correction") if getattr(self, name)]
        parts += [self.phase] if self.phase != "all" else []
        parts += [f"operand_{self.activation_block}"] if self.activation_block else []
        parts += ["dense"] if self.keeps_all else []
        return "_".join(parts) or "plain"


def signature_of(node: onnx.NodeProto) -> Signature:
    """The signature of a node of ours.

    Raises:
        ArtifactError: if the node breaks the op contract.
    """
    check_node(node)
    present = present_inputs(node)
    values = attribute_values(node)
    schema = op_contract().ops[node.op_type]
    return Signature(
        op_type="NMLinear" if node.op_type == "NMLinear" else "NMPrune",
        optional_inputs=tuple(name for name in schema.optional_inputs if name in present),
        keeps_all=values["n"] == values["m"],
        dynamic_shift=bool(values.get("dynamic_shift", 0)),
        variance_correction=bool(values.get("variance_correction", 0)),
        phase=str(values.get("phase", "all")),
        activation_block=int(values["activation_block"]) if values.get("activation_bits") else 0,
    )


def function_protos_for(
    nodes: Iterable[onnx.NodeProto], *, opset: int = OPSET
) -> list[onnx.FunctionProto]:
    """Functions for all of a model's nodes of ours; sets each node's `overload`.

    Args:
        nodes: Nodes of domain `nmexport` (pass all of them at once: whether overloads are needed
            depends on all).
        opset: The model's opset of the default domain.

    Raises:
        ArtifactError: if a node breaks the op contract.
    """
    signed = [(node, signature_of(node)) for node in nodes]
    functions = functions_for((signature for _, signature in signed), opset=opset)
    for node, signature in signed:
        node.overload = functions[signature].overload
    return list(functions.values())


def functions_for(
    signatures: Iterable[Signature], *, opset: int = OPSET
) -> dict[Signature, onnx.FunctionProto]:
    """One function for each distinct signature, in a fixed order.

    A function's `overload` is empty where its op has one signature only.
    """
    distinct = sorted(set(signatures))
    used = [signature.op_type for signature in distinct]
    return {
        signature: _function(
            signature,
            overload=signature.overload if used.count(signature.op_type) > 1 else "",
            opset=opset,
        )
        for signature in distinct
    }


def _function(signature: Signature, *, overload: str, opset: int) -> onnx.FunctionProto:
    """Parse the body of a signature."""
    contract = op_contract()
    schema = contract.ops[signature.op_type]
    body = prune_steps(signature) if signature.op_type == "NMPrune" else _linear_body(signature)
    inputs = ", ".join(spec.name for spec in schema.inputs)
    function = onnx.parser.parse_function(
        f'<opset_import: ["" : {opset}], domain: "{contract.domain}">\n'
        f"{signature.op_type} ({inputs}) => (Y) {{\n" + "\n".join(body) + "\n}"
    )
    function.overload = overload
    function.doc_string = schema.doc
    for attribute in schema.attributes:
        if attribute.default is None:
            function.attribute.append(attribute.name)
        else:
            function.attribute_proto.append(
                onnx.helper.make_attribute(attribute.name, attribute.default)
            )
    return function


def prune_steps(signature: Signature) -> list[str]:
    """Steps from `X` to `Y` of an NMPrune, for functions with its inputs and attributes."""
    if signature.keeps_all:
        return ["Y = Identity (X)"]
    return [
        "x = Cast <to: int = 1> (X)",
        "x_shape = Shape (X)",
        *_gathered("x", "selected", signature),
        *_selection("selected", "keep_selected", signature),
        *_in_own_order("keep_selected", "keep", signature),
        "zero = Constant <value_float: float = 0.0> ()",
        "s = Where (keep, x, zero)",
        "Y = CastLike (s, X)",
    ]


def _linear_body(signature: Signature) -> list[str]:
    """Y = nu * (s @ W) + eta * shift_weight + bias, on the shifted token z.

    A phase decides, for all tokens of a run alike, which operand meets W and what is added.
    """
    lines = [
        "own = Cast <to: int = 1> (X)",
        *_gathered("own", "x", signature),
        *weight_steps(signature),
        "x_shape = Shape (X)",
        "last_axis = Constant <value_ints: ints = [-1]> ()",
        *_shifted(signature),
        *_kept(signature),
        *_scaled("s", "value_scale", "sparse_values", signature),
        *_phase_gate(signature),
        *_operand("values", signature),
        "whole_product = MatMul (operand, w)",
        *_variance_corrected(signature),
    ]
    return lines + _with_additions(signature)


def _kept(signature: Signature) -> list[str]:
    """`z [..., K]` -> `s`, exact zero where dropped."""
    if signature.keeps_all:
        return ["s = Identity (z)"]
    return [
        *_selection("z", "keep", signature),
        "zero = Constant <value_float: float = 0.0> ()",
        "s = Where (keep, z, zero)",
    ]


def _scaled(source: str, scale: str, target: str, signature: Signature) -> list[str]:
    """`source [..., K]` times an optional input `[K]` -> `target`."""
    if signature.has(scale):
        return [f"{target} = Mul ({source}, {scale})"]
    return [f"{target} = Identity ({source})"]


def _gathered(source: str, target: str, signature: Signature) -> list[str]:
    """`source [..., K]` -> `target [..., K]` in gathered order."""
    if signature.has("channel_order"):
        return [f"{target} = Gather <axis: int = -1> ({source}, channel_order)"]
    return [f"{target} = Identity ({source})"]


def _operand(source: str, signature: Signature) -> list[str]:
    """`source [..., K]` -> `operand`, what meets W: rounded to 8 bits where the node says so."""
    if not signature.activation_block:
        return [f"operand = Identity ({source})"]
    return [
        "block_length = Constant <value_int: int = @activation_block> ()",
        "block_lengths = Reshape (block_length, last_axis)",
        "block_shape = Concat <axis: int = 0> (last_axis, block_lengths)",
        f"blocks = Reshape ({source}, block_shape)",
        "block_sizes = Abs (blocks)",
        "largest = ReduceMax <keepdims: int = 1> (block_sizes, last_axis)",
        # A block of zeros: 0 / tiny is 0.
        "tiny = Constant <value: tensor = float {1e-45}> ()",
        "divisor = Max (largest, tiny)",
        f"level_count = Constant <value_float: float = {_LEVELS}.0> ()",
        # The quotient first: times 127, a float32 may overflow. Infinities become NaN.
        "shares = Div (blocks, divisor)",
        "exact_levels = Mul (shares, level_count)",
        "levels = Round (exact_levels)",
        "level = Div (largest, level_count)",
        "rounded_blocks = Mul (levels, level)",
        "operand = Reshape <allowzero: int = 1> (rounded_blocks, x_shape)",
    ]


def weight_steps(signature: Signature) -> list[str]:
    """Steps from `W [K, O]` to `w` float32: stored values less zero points, times scales."""
    if not signature.has("weight_scale"):
        return ["w = Cast <to: int = 1> (W)"]
    return [
        "stored = Cast <to: int = 1> (W)",
        "w_shape = Shape (W)",
        "scale_shape = Shape (weight_scale)",
        "front = Constant <value_ints: ints = [0]> ()",
        "middle = Constant <value_ints: ints = [1]> ()",
        "scale_groups = Gather <axis: int = 0> (scale_shape, front)",
        "columns = Gather <axis: int = 0> (scale_shape, middle)",
        "rest = Constant <value_ints: ints = [-1]> ()",
        "group_shape = Concat <axis: int = 0> (scale_groups, rest, columns)",
        "grouped = Reshape (stored, group_shape)",  # [G, K / G, O]
        *_less_zero_point(signature),
        "scale = Cast <to: int = 1> (weight_scale)",
        "scales = Unsqueeze (scale, middle)",  # [G, 1, O]
        "scaled_groups = Mul (centred, scales)",
        "w = Reshape (scaled_groups, w_shape)",
    ]


def _less_zero_point(signature: Signature) -> list[str]:
    """`grouped [G, K / G, O]` -> `centred`."""
    if not signature.has("weight_zero_point"):
        return ["centred = Identity (grouped)"]
    return [
        "zero_point = Cast <to: int = 1> (weight_zero_point)",
        "zero_points = Unsqueeze (zero_point, middle)",
        "centred = Sub (grouped, zero_points)",
    ]


def _shifted(signature: Signature) -> list[str]:
    """`x` -> `z`, and `eta` where it is needed again."""
    if signature.dynamic_shift:
        return ["eta = ReduceMean <keepdims: int = 1> (x, last_axis)", "z = Sub (x, eta)"]
    if signature.has("shift"):
        return ["z = Sub (x, shift)"]
    return ["z = Identity (x)"]


def _selection(source: str, target: str, signature: Signature) -> list[str]:
    """`source [..., K] float32`, `x_shape` -> `target [..., K] bool`, groups consecutive.

    Groups become rows `[tokens * K / m, m]`, so that TopK over a row is the whole selection.
    """
    lines = [f"magnitude = Abs ({source})"]
    score = "magnitude"
    if signature.has("score_scale"):
        lines += ["scaled = Mul (magnitude, score_scale)"]
        score = "scaled"
    return [
        *lines,
        "kept_count = Constant <value_int: int = @n> ()",
        "group_size = Constant <value_int: int = @m> ()",
        "any_length = Constant <value_ints: ints = [-1]> ()",
        "one_element = Constant <value_ints: ints = [1]> ()",
        "k = Reshape (kept_count, one_element)",
        "m_list = Reshape (group_size, one_element)",
        "row_shape = Concat <axis: int = 0> (any_length, m_list)",
        f"rows = Reshape ({score}, row_shape)",
        "is_nan = IsNaN (rows)",
        "wide = Cast <to: int = 11> (rows)",
        f"ceiling = Constant <value: tensor = double {{{_ABOVE_FLOAT32}}}> ()",
        "below_nan = Min (wide, ceiling)",
        "infinity = Constant <value: tensor = double {inf}> ()",
        "rank = Where (is_nan, infinity, below_nan)",
        "top, index = TopK <axis: int = -1, largest: int = 1, sorted: int = 0> (rank, k)",
        "rows_shape = Shape (rows)",
        "index_shape = Shape (index)",
        "none_kept = ConstantOfShape <value: tensor = bool[1] {0}> (rows_shape)",
        "mark = ConstantOfShape <value: tensor = bool[1] {1}> (index_shape)",
        "keep_rows = ScatterElements <axis: int = -1> (none_kept, index, mark)",
        f"{target} = Reshape <allowzero: int = 1> (keep_rows, x_shape)",
    ]


def _in_own_order(source: str, target: str, signature: Signature) -> list[str]:
    """`source [..., K]` in gathered order -> `target [..., K]` in X's own."""
    if not signature.has("channel_order"):
        return [f"{target} = Identity ({source})"]
    # The inverse permutation is a constant of the model: a runtime folds it away.
    return [
        "channels = Size (channel_order)",
        "first = Constant <value_int: int = 0> ()",
        "step = Constant <value_int: int = 1> ()",
        "channel = Range (first, channels, step)",
        "place = ScatterElements <axis: int = 0> (channel, channel_order, channel)",
        f"{target} = Gather <axis: int = -1> ({source}, place)",
    ]


def _phase_gate(signature: Signature) -> list[str]:
    """`sparse_values`, `x` -> `values`, and `is_dense` where `phase` excludes the tokens.

    What is not taken may be anything, NaN included: it is selected away, not multiplied.
    """
    if signature.phase == "all":
        return ["values = Identity (sparse_values)"]
    return [
        *is_dense_steps(signature.phase, "X"),
        *_scaled("x", "dense_scale", "dense_values", signature),
        "values = Where (is_dense, dense_values, sparse_values)",
    ]


def is_dense_steps(phase: str, rows: str) -> list[str]:
    """Steps that make `is_dense [1]`: whether a phase other than `all` leaves these rows dense."""
    return [
        f"sizes = Shape ({rows})",
        # The 1 in front makes a single token of rank 1 a sequence of length 1.
        "single = Constant <value_ints: ints = [1]> ()",
        "padded_sizes = Concat <axis: int = 0> (single, sizes)",
        "sequence_axis = Constant <value_ints: ints = [-2]> ()",
        "sequence_length = Gather <axis: int = 0> (padded_sizes, sequence_axis)",
        f"is_dense = {'Greater' if phase == 'decode' else 'Equal'} (sequence_length, single)",
    ]


def _variance_corrected(signature: Signature) -> list[str]:
    """`whole_product`, `z`, `s` -> `product`."""
    if not signature.variance_correction or signature.keeps_all:
        return ["product = Identity (whole_product)"]
    return [
        *_variance("z"),
        *_variance("s"),
        f"floor = Constant <value_float: float = {op_contract().variance_floor}> ()",
        "s_floored = Max (s_variance, floor)",
        "ratio = Div (z_variance, s_floored)",
        "selected_nu = Sqrt (ratio)",
        *_in_phase("selected_nu", "nu", "1.0", signature),
        "product = Mul (nu, whole_product)",
    ]


def _in_phase(source: str, target: str, otherwise: str, signature: Signature) -> list[str]:
    """`source` -> `target`: a number in its place where `phase` excludes the tokens."""
    if signature.phase == "all":
        return [f"{target} = Identity ({source})"]
    return [
        f"{target}_otherwise = Constant <value_float: float = {otherwise}> ()",
        f"{target} = Where (is_dense, {target}_otherwise, {source})",
    ]


def _variance(name: str) -> list[str]:
    """`name [..., K]` -> `name_variance [..., 1]`, in two passes: one would cancel."""
    return [
        f"{name}_mean = ReduceMean <keepdims: int = 1> ({name}, last_axis)",
        f"{name}_deviation = Sub ({name}, {name}_mean)",
        f"{name}_square = Mul ({name}_deviation, {name}_deviation)",
        f"{name}_variance = ReduceMean <keepdims: int = 1> ({name}_square, last_axis)",
    ]


def _with_additions(signature: Signature) -> list[str]:
    """`product` -> `Y`."""
    lines = []
    total = "product"
    if signature.dynamic_shift:
        lines += [
            "moved_back = Mul (eta, shift_weight)",
            *_in_phase("moved_back", "shifted_back", "0.0", signature),
            f"unshifted = Add ({total}, shifted_back)",
        ]
        total = "unshifted"
    if signature.has("bias") or signature.has("dense_bias"):
        lines += [*addend_steps(signature), f"biased = Add ({total}, addend)"]
        total = "biased"
    return [*lines, f"Y = CastLike ({total}, X)"]


def addend_steps(signature: Signature) -> list[str]:
    """`bias` and `dense_bias`, either of which may be absent -> `addend [O]` or a scalar.

    Needs `is_dense` where the phase is not `all`.
    """
    if signature.phase == "all":
        return ["addend = Cast <to: int = 1> (bias)"]
    absent = "Constant <value_float: float = 0.0> ()"
    return [
        "sparse_bias = " + ("Cast <to: int = 1> (bias)" if signature.has("bias") else absent),
        "own_bias = "
        + ("Cast <to: int = 1> (dense_bias)" if signature.has("dense_bias") else absent),
        "addend = Where (is_dense, own_bias, sparse_bias)",
    ]
