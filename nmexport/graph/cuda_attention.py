"""Attention for ONNX Runtime's CUDA provider: grouped heads, the cache in place, rotary inside."""

from __future__ import annotations

import onnx_ir as ir

from nmexport.graph.attention_form import (
    PAST_KEYS,
    PAST_VALUES,
    AttentionForm,
    AttentionReader,
    NotRewritableError,
)
from nmexport.graph.fused import FUSED, add_function

CONTRIB = "com.microsoft"
LAST_POSITIONS = "last_positions"
TOTAL_LENGTH = "total_sequence_length"

_HEAD_UNIT = 8
"""The provider's attention kernels want head sizes that are multiples of this."""
_LARGEST_HEAD = 256
_CACHED_ATTENTION = f"""<opset_import: ["" : 23, "{CONTRIB}" : 1], domain: "{FUSED}">
CachedAttention <num_heads, kv_num_heads, do_rotary, local_window_size, scale>
    (queries, keys, values, past_keys, past_values, last, total, cosines, sines)
    => (Y, present_keys, present_values) {{
    Y, present_keys, present_values = {CONTRIB}.GroupQueryAttention <
        num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads,
        do_rotary: int = @do_rotary, local_window_size: int = @local_window_size,
        scale: float = @scale
    > (queries, keys, values, past_keys, past_values, last, total, cosines, sines)
}}"""


class ReplaceAttention(ir.passes.InPlacePass):
    """Every `Attention` over a cache becomes an op that writes the cache in place.

    It is our `CachedAttention`, whose kernel takes decode steps and hands prompts to the runtime's
    `GroupQueryAttention`; or that op itself, which has the same inputs and attributes.

    Requires: what `AttentionReader` does; float16, bfloat16, or float32 (which only the CPU
    provider computes: for tests). Ensures: same values within rounding.
    """

    def __init__(self, positions: int, *, has_own_kernel: bool = True) -> None:
        """Make rotary tables for that many positions."""
        super().__init__()
        self._positions = positions
        self._op = (
            (FUSED, "CachedAttention") if has_own_kernel else (CONTRIB, "GroupQueryAttention")
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        reader = AttentionReader(graph, self._positions)
        nodes = reader.nodes()
        lengths = _add_length_inputs(graph)
        for node in nodes:
            form = reader.read(node)
            form.replace_by(_grouped_attention(self._op, form, lengths))
        for value in graph.inputs:
            if value.name and value.name.startswith("past_key_values."):
                _rename_axis(value, "capacity")
        for value in graph.outputs:
            if value.name and value.name.startswith("present."):
                _rename_axis(value, "capacity")
        model.graph.opset_imports[CONTRIB] = 1
        if self._op[0] == FUSED:
            add_function(model, _CACHED_ATTENTION)
        return ir.passes.PassResult(model, modified=True)


def _add_length_inputs(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    last = ir.val(LAST_POSITIONS, dtype=ir.DataType.INT32, shape=["batch_size"])
    total = ir.val(TOTAL_LENGTH, dtype=ir.DataType.INT32, shape=[])
    graph.inputs.extend([last, total])
    return last, total


def _grouped_attention(
    op: tuple[str, str], form: AttentionForm, lengths: tuple[ir.Value, ir.Value]
) -> ir.Node:
    if form.head_size % _HEAD_UNIT or form.head_size > _LARGEST_HEAD:
        raise NotRewritableError(f"head size {form.head_size}")
    attributes: list[ir.Attr] = [
        ir.AttrInt64("num_heads", form.heads),
        ir.AttrInt64("kv_num_heads", form.kv_heads),
        ir.AttrInt64("do_rotary", int(form.tables is not None)),
        ir.AttrInt64("local_window_size", form.window),
    ]
    if form.scale is not None:
        attributes.append(ir.AttrFloat32("scale", form.scale))
    is_packed = len(form.sources) == 1
    return ir.Node(
        *op,
        [
            *form.sources,
            *([None, None] if is_packed else []),
            form.node.inputs[PAST_KEYS],
            form.node.inputs[PAST_VALUES],
            *lengths,
            *(form.tables or (None, None)),
        ],
        attributes,
        num_outputs=3,
        name=form.node.name,
    )


def _rename_axis(value: ir.Value, name: str) -> None:
    if value.shape is not None:
        shape = list(value.shape)
        shape[2] = ir.SymbolicDim(name)
        value.shape = ir.Shape(shape)
