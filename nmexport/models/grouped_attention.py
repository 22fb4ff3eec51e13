"""Attention for text generation, where reading the cache is the cost."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nmexport.models.attention import with_effect
from nmexport.models.swap import swapped_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "nmexport_grouped"
_REPLACED = "sdpa"


@contextlib.contextmanager
def grouped_attention(model: Any) -> Iterator[bool]:
    """Make a model attend in the type of its cache, where query heads share keys.

    Transformers' own wants queries and cache in one type, and keys that each query head has to
    itself.

    Args:
        model: A Hugging Face causal language model; left alone where its attention is not `sdpa`.

    Yields:
        Whether it does.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    replaceable = getattr(model, "_supports_attention_backend", False)
    if not replaceable or model.config._attn_implementation != _REPLACED:  # noqa: SLF001
        yield False
        return
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    with swapped_attention(model, NAME):
        yield True


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot product attention in the type of the keys.

    Args:
        module: The attention module.
        query: `[B, H, S, D]`.
        key: `[B, H_kv, T, D]`, H a multiple of H_kv.
        value: `[B, H_kv, T, D_v]`.
        attention_mask: As `sdpa_mask` makes it, `[B, 1, S, T]`.
        scaling: Factor of the scores; `1 / sqrt(D)` where None.
        arguments: For transformers' own function.

    Returns:
        `[B, S, H, D_v]` in the type of the queries, and None for the attention weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries = query.to(key.dtype)
    if query.shape[2] > 1 or attention_mask is not None or with_effect(arguments):
        output, _ = sdpa_attention_forward(
            module, queries, key, value, attention_mask, scaling=scaling, **arguments
        )
        return output.to(query.dtype), None
    # A new token sees all keys.
    heads = nn.functional.scaled_dot_product_attention(
        queries, key, value, scale=scaling, enable_gqa=True
    )
    return heads.transpose(1, 2).to(query.dtype), None
