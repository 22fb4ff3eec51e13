"""Attention with keys read once for a group of heads: transformers' own, in the cache's type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.models.grouped_attention import NAME, grouped_attention
from nmexport.models.growing_cache import growing_cache

from tests.models.test_growing_cache import LENGTH, loaded, logits
from tests.support.tiny import FAMILIES, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers_own(kind: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, kind)
    model = loaded(tmp_path)
    wanted = logits(model, growing_cache(model, LENGTH))
    with grouped_attention(model) as replaced:
        assert replaced == (model.config._attn_implementation == NAME)
        found = logits(model, growing_cache(model, LENGTH))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation != NAME
    assert torch.equal(logits(model, growing_cache(model, LENGTH)), wanted)


def test_heads_of_a_group_see_a_cache_in_bfloat16(tiny_llama: Path) -> None:
    model = loaded(tiny_llama)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    wanted = logits(model, growing_cache(model, LENGTH))
    with grouped_attention(model) as replaced:
        assert replaced
        cache = growing_cache(model, LENGTH, dtype=torch.bfloat16)
        found = logits(model, cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_attention_of_another_kind_is_left_alone(tiny_llama: Path) -> None:
    model = loaded(tiny_llama)
    model.set_attn_implementation("eager")
    with grouped_attention(model) as replaced:
        assert not replaced
        assert model.config._attn_implementation == "eager"
