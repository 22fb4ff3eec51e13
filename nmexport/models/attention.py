"""How attention is written into an exported graph.

Transformers dispatches attention and its mask through registries; the pair registered here traces
to one standard ONNX `Attention` node a layer instead of the dozens of nodes that an implementation
made for eager execution leaves, and with a mask that no runtime can turn into NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "nmexport_onnx"


def register() -> str:
    """Make the pair known to transformers and return its `attn_implementation` name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, additive_mask)
    return NAME


def additive_mask(
    *, attention_mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **arguments: Any
) -> Tensor:
    """The mask `[B, 1, S, T]` (B is 1 without padding) that is added to the scores.

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
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot product attention with grouped key and value heads.

    Args:
        module: The attention module, unused.
        query: `[B, H, S, D]`.
        key: `[B, H_kv, T, D]`, H a multiple of H_kv.
        value: `[B, H_kv, T, D_v]`.
        attention_mask: Additive, `[B, 1, S, T]`.
        scaling: Factor of the scores; `1 / sqrt(D)` where None.
        dropout: Has no part in inference.
        softcap: Where given, scores become `softcap * tanh(scores / softcap)` before the mask.

    Returns:
        `[B, S, H, D_v]`, and None for the attention weights, which nobody asks for.
    """
    del module, dropout
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        output = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scale)[0]
    else:
        output = _softcapped(
            query, key, value, attention_mask=attention_mask, scale=scale, softcap=softcap
        )
    return output.transpose(1, 2).contiguous(), None


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention in elementary nodes, softmax in float32.

    ONNX's own `softcap` attribute caps after the mask is added (opset 23), which unmasks.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)
