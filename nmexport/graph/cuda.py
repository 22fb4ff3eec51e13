"""The graph that ONNX Runtime's CUDA provider runs fastest, made from an exported one.

The exported file is portable: standard ops, a mask and positions as inputs, caches that grow by
concatenation. A decode step of it spends half of its time between the linears. The graph made here
computes the same with what the provider has for it:

    packed q, k, v ──► attention ──► linear ──► norm of the residual sum ──► linear ──►
                       ▲ rotary, mask and cache append inside; the cache is written in place
                                                ▲ pruned for the linear behind, see `pruned`

Inputs differ from the exported file's:

| input | shape | meaning |
|---|---|---|
| `input_ids` | `[B, S]` | the new tokens; prompts of different lengths are padded on the right |
| `last_positions` | `[B]` int32 | position of each sequence's last new token, padding not counted |
| `total_sequence_length` | `[]` int32, host | longest sequence, new tokens included, or a bound |
| `logits_at` | `[L]` int64 | which of the S new tokens get logits |
| `past_key_values.{i}.key`, `.value` | `[B, H_kv, capacity, D]` | the cache; bind `present` to it |

There is one output more: `next_ids` `[B, L]` int64, the likeliest token of each row of logits.

Weights are named, never read: they stay where the exported file has them.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from nmexport.graph.cuda_attention import ReplaceAttention
from nmexport.graph.cuda_sampling import ChooseLikeliest
from nmexport.graph.dense_linears import GatherBeforeHead, UseOurLinears
from nmexport.graph.fused import FuseGatedSilu, FuseResidualNorm
from nmexport.graph.pruned import PruneWhereMade

_HALF_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def rewrite_for_cuda(model: ir.Model, *, positions: int, has_own_attention: bool = True) -> None:
    """Turn an exported model into the one described above, in place.

    Args:
        model: The exported model; its external weights need not be readable.
        positions: How many positions the rotary tables cover.
        has_own_attention: Use our attention op, and not the runtime's alone.

    Raises:
        NotRewritableError: if some layer's attention has another form; the model is then spoilt.
    """
    ReplaceAttention(positions, has_own_kernel=has_own_attention)(model)
    FuseResidualNorm()(model)
    FuseGatedSilu()(model)
    GatherBeforeHead()(model)
    UseOurLinears(_HALF_TYPES, whole_groups=True)(model)
    PruneWhereMade(_HALF_TYPES)(model)
    ChooseLikeliest()(model)
    common.RemoveUnusedNodesPass()(model)
    _drop_unused_inputs(model.graph)
    common.RemoveUnusedOpsetsPass()(model)
    model.graph.sort()


def _drop_unused_inputs(graph: ir.Graph) -> None:
    unused = [
        value
        for value in graph.inputs
        if not value.uses() and value.name in {"attention_mask", "position_ids"}
    ]
    for value in unused:
        graph.inputs.remove(value)
