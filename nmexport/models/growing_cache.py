"""A KV cache of fixed length, written in place.

Transformers' own grows by concatenation: each step copies all that is cached, which for many
sequences side by side is a quarter of what a step takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    import torch


def growing_cache(model: Any, length: int, *, dtype: torch.dtype | None = None) -> DynamicCache:
    """Make an empty cache for a model; layers with a window or a state keep their own kind.

    Args:
        model: A Hugging Face causal language model.
        length: Most tokens that a sequence will have.
        dtype: What keys and values are rounded to; None keeps the model's own. The model's
            attention must take it: see `grouped_attention`.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _GrowingLayer(length, dtype) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[B, H, P, D]`: views of buffers `[B, H, length, D]`."""

    def __init__(self, length: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._length = length
        self._dtype = dtype
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens `[B, H, S, D]`; return all.

        Raises:
            ValueError: if there are more than the length.
        """
        del args, kwargs
        before = self.get_seq_length()
        end = before + key_states.shape[-2]
        if end > self._length:
            raise ValueError(f"{end} tokens for a cache of {self._length}")
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = self._buffer(key_states), self._buffer(value_states)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self._length, width, dtype=self._dtype)
