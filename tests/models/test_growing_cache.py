"""A KV cache that is written in place: what transformers' own gives, and no more than it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.models.growing_cache import growing_cache
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.recipe import ModelSection
from transformers.cache_utils import DynamicCache

from tests.support.tiny import FAMILIES, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

LENGTH = 24
IDS = torch.randint(3, 100, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path) -> Any:
    return load_model(resolve(ModelSection(id=str(folder))))


def logits(model: Any, cache: Any) -> torch.Tensor:
    """Of a prompt of five tokens, of two together, and then of one at a time."""
    pieces = [IDS[:, :5], IDS[:, 5:7], *torch.split(IDS[:, 7:], 1, dim=1)]
    with torch.inference_mode():
        found = [
            model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces
        ]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_cache_that_is_copied(kind: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, kind)
    model = loaded(tmp_path)
    cache = growing_cache(model, LENGTH)
    found = logits(model, cache)
    assert torch.equal(found, logits(model, DynamicCache(config=model.config)))
    assert cache.get_seq_length() == LENGTH


def test_memory_is_taken_once(tiny_llama: Path) -> None:
    model = loaded(tiny_llama)
    cache = growing_cache(model, LENGTH)
    places = set()
    with torch.inference_mode():
        for piece in torch.split(IDS, 1, dim=1):
            model(input_ids=piece, past_key_values=cache, use_cache=True)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


def test_more_than_it_holds_is_refused(tiny_llama: Path) -> None:
    model = loaded(tiny_llama)
    with torch.inference_mode(), pytest.raises(ValueError, match="24 tokens for a cache of 23"):
        logits(model, growing_cache(model, LENGTH - 1))


def test_layers_with_a_window_keep_their_own(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gemma3_text")
    model = loaded(tmp_path)
    own = DynamicCache(config=model.config)
    kept = [
        type(one) is type(other)
        for one, other in zip(growing_cache(model, LENGTH).layers, own.layers, strict=True)
    ]
    assert kept == [True, False]
