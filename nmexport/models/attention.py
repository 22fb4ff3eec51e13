"""Attention as it is written into an exported graph.

Transformers dispatches attention and its mask through registries; the pair registered here traces
to one standard ONNX `Attention` node a layer instead of the dozens of nodes that an implementation
made for eager execution leaves, and with a mask that no runtime can turn into NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "nmexport_onnx"


def register() -> str:
    """Register the pair with transformers and return its `attn_implementation` name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, additive_mask)
    return NAME


def additive_mask(
    *, attention_mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Tensor:
    """Build the mask `[B, 1, S, T]` (B is 1 without padding) that is added to the scores.

    It is 0 where a key is seen and half of the lowest number of the type elsewhere. Not minus
    infinity, as a padded query sees no key at all and its softmax would be NaN, which spreads
    through the cache; half, as lowest plus a negative score is minus infinity in float16.

    Args:
        attention_mask: 1 where a token is real, `[B, T]`.
        dtype: Type of the scores.
        arguments: What transformers hands to a mask function: lengths, offsets and the rule of
            which positions see which (causal, windowed).
    """
    from transformers.masking_utils import sdpa_mask

    by_position = {
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
        "attention_mask": None,
        "batch_size": 1,
    }
    seen = sdpa_mask(**{**arguments, **by_position})
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].to(torch.bool)
    lowest = torch.full((), torch.finfo(dtype).min / 2, dtype=dtype)
    return torch.where(seen, torch.zeros((), dtype=dtype), lowest)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot product attention with grouped key and value heads.

    Args:
        module: The attention module, named where something is refused.
        query: `[B, H, S, D]`.
        key: `[B, H_kv, T, D]`, H a multiple of H_kv.
        value: `[B, H_kv, T, D_v]`.
        attention_mask: Additive, `[B, 1, S, T]`.
        scaling: Factor of the scores; `1 / sqrt(D)` where None.
        softcap: Where given, scores become `softcap * tanh(scores / softcap)` before the mask.
        s_aux: Attention sinks `[H]`: one more score a head that takes weight and gives nothing.
        position_bias: Added to the scores, `[1 or B, H, S, T]`.
        arguments: What else transformers hands to an attention function.

    Returns:
        `[B, S, H, D_v]`, and None for the attention weights, which nobody asks for.

    Raises:
        ModelError: if there is an argument that would change the result in an unknown way.
    """
    refuse_unknown(module, arguments)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if position_bias is not None:
        bias = position_bias.to(query.dtype)
        attention_mask = bias if attention_mask is None else attention_mask + bias
    # The tracer's shape of an `Attention` node takes values to be as wide as keys.
    same_width = value.shape[-1] == query.shape[-1]
    if softcap is None and s_aux is None and same_width:
        output = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scale)[0]
    else:
        scores = _scores(query, key, scale)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = _weights(scores, s_aux).to(query.dtype)
        output = torch.matmul(weights, _repeat(value, query.shape[1]))
    return output.transpose(1, 2).contiguous(), None


# Arguments that say nothing the mask does not say already, or nothing about the result.
_WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


def with_effect(arguments: Mapping[str, Any]) -> list[str]:
    """List the further arguments of attention that may change its result."""
    return sorted(
        name
        for name, value in arguments.items()
        if name not in _WITHOUT_EFFECT and value is not None and value is not False
    )


def refuse_unknown(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse an argument of attention that is set and not known to be without effect.

    Raises:
        ModelError: if there is one; names it and the module's class.
    """
    unknown = with_effect(arguments)
    if unknown:
        raise ModelError(
            f"{type(module).__name__} hands its attention {', '.join(unknown)}, which nmexport "
            "does not know: the exported model would compute something else.",
            allowed="scaled dot product attention with a causal mask, a sliding window, a soft "
            "cap, sinks (s_aux) or a position bias",
            fix="use a model of another family",
        )


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return torch.matmul(query, _repeat(key, query.shape[1]).transpose(2, 3)) * scale


def _repeat(states: Tensor, heads: int) -> Tensor:
    """Repeat keys or values `[B, H_kv, T, D]` for each query head."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in float32 over the scores `[B, H, S, T]` and the sinks' own, which is dropped.

    In elementary nodes: ONNX's `Attention` knows no sinks, and its own `softcap` caps after the
    mask is added (opset 23), which unmasks.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    column = sinks.reshape(1, -1, 1, 1).to(scores.dtype).expand_as(scores[..., :1])
    combined = torch.cat([scores, column], dim=-1)
    return torch.softmax(combined, dim=-1, dtype=torch.float32)[..., :-1]
