"""Attention as it is exported, against transformers' own eager implementation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nmexport.models.attention import additive_mask, attention
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

B, S, T, D = 2, 3, 7, 8


def mask(dtype: torch.dtype = torch.float32, window: int | None = None) -> torch.Tensor:
    """Three new tokens after four cached ones; the second sequence begins with five of padding."""
    padding = torch.ones(B, T, dtype=torch.long)
    padding[1, :5] = 0
    rule = sliding_window_causal_mask_function(window) if window else causal_mask_function
    return additive_mask(
        batch_size=B,
        q_length=S,
        kv_length=T,
        q_offset=T - S,
        mask_function=rule,
        attention_mask=padding,
        dtype=dtype,
    )


def test_mask_sees_the_past_and_no_padding() -> None:
    seen = mask()[:, 0] == 0
    assert seen[0].tolist() == [
        [True] * 5 + [False] * 2,
        [True] * 6 + [False],
        [True] * 7,
    ]
    assert seen[1].any(dim=1).tolist() == [False, True, True]


def test_mask_of_a_window() -> None:
    assert (mask(window=2)[0, 0] == 0).sum(dim=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_that_sees_nothing_stays_finite(dtype: torch.dtype) -> None:
    """Even the most negative score on top must not reach minus infinity."""
    scores = torch.full((B, 1, S, T), -1000.0, dtype=dtype) + mask(dtype)
    assert scores.isfinite().all()
    assert torch.softmax(scores, dim=-1).isfinite().all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_attention(softcap: float | None, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query = torch.randn(B, heads[0], S, D)
    key, value = (torch.randn(B, heads[1], T, D) for _ in range(2))
    module = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], training=False)
    arguments = {"scaling": 0.7, "softcap": softcap}
    expected, _ = eager_attention_forward(module, query, key, value, mask(), **arguments)
    actual, weights = attention(module, query, key, value, mask(), **arguments)
    assert weights is None
    torch.testing.assert_close(actual, expected)


def test_softcap_without_a_mask() -> None:
    query, key, value = (torch.randn(1, 2, S, D) for _ in range(3))
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    arguments = {"scaling": 1.0, "softcap": 1.0}
    expected, _ = eager_attention_forward(module, query, key, value, None, **arguments)
    torch.testing.assert_close(attention(module, query, key, value, None, **arguments)[0], expected)
