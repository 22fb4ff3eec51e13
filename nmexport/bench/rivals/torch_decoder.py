"""A decoder in plain PyTorch as one would write it for torch.compile, with random weights.

The cache is buffers of a fixed size, written in place, so that a step has the same addresses each
time; projections that read the same input are one linear; the next token is chosen on the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from nmexport.bench.rivals.shapes import Shapes

_ROTARY_BASE = 10000.0
_LARGEST_INT8 = 127


class MakeLinear(Protocol):
    """Makes a linear with random weights."""

    def __call__(self, in_features: int, out_features: int) -> nn.Module:
        """Return a module that maps `[..., in_features]` to `[..., out_features]`."""
        ...


class DenseLinear(nn.Module):
    """`x @ W.T` with W `[O, K]` in the type of the activations."""

    def __init__(
        self, in_features: int, out_features: int, *, device: str, dtype: torch.dtype
    ) -> None:
        """Draw the weights on the device, so that a unit input gives outputs of unit size."""
        super().__init__()
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        weight.normal_(0, 1 / math.sqrt(in_features))
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return functional.linear(x, self.weight)


class Int8Linear(nn.Module):
    """Weights in int8 with a scale for each output, widened on their way into the product."""

    weight: Tensor
    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, device: str, dtype: torch.dtype
    ) -> None:
        """Draw the weights on the device, so that a unit input gives outputs of unit size."""
        super().__init__()
        shape = (out_features, in_features)
        drawn = torch.randint(
            -_LARGEST_INT8, _LARGEST_INT8 + 1, shape, dtype=torch.int8, device=device
        )
        self.register_buffer("weight", drawn)
        # Uniform numbers up to 127 have a deviation of 127 / sqrt(3).
        scale = math.sqrt(3 / in_features) / _LARGEST_INT8
        self.register_buffer("scale", torch.full((out_features,), scale, device=device).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return functional.linear(x, self.weight.to(x.dtype)) * self.scale


class _Block(nn.Module):
    keys: Tensor
    values: Tensor

    def __init__(
        self, shapes: Shapes, linear: MakeLinear, *, device: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.shapes = shapes
        self.qkv = linear(shapes.hidden, shapes.qkv)
        self.output = linear(shapes.heads * shapes.head_size, shapes.hidden)
        self.gate_up = linear(shapes.hidden, 2 * shapes.intermediate)
        self.down = linear(shapes.intermediate, shapes.hidden)
        self.attention_norm = nn.RMSNorm(shapes.hidden, device=device, dtype=dtype)
        self.mlp_norm = nn.RMSNorm(shapes.hidden, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        x = x + self._attention(self.attention_norm(x), positions, cos, sin, mask)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        down: Tensor = self.down(functional.silu(gate) * up)
        return x + down

    def _attention(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None
    ) -> Tensor:
        shapes = self.shapes
        batch, length, _ = x.shape
        kv = shapes.kv_heads * shapes.head_size
        parts = self.qkv(x).split([shapes.heads * shapes.head_size, kv, kv], -1)
        queries, keys, values = (
            part.view(batch, length, -1, shapes.head_size).transpose(1, 2) for part in parts
        )
        queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
        self.keys[:, :, positions] = keys
        self.values[:, :, positions] = values
        if mask is None:  # a prompt on an empty cache: it attends to itself alone
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=True
            )
        else:
            attended = functional.scaled_dot_product_attention(
                queries, self.keys, self.values, attn_mask=mask, enable_gqa=True
            )
        output: Tensor = self.output(attended.transpose(1, 2).reshape(batch, length, -1))
        return output


class Decoder(nn.Module):
    """Token ids in, the likeliest next one of each sequence out."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, shapes: Shapes, linear: MakeLinear, *, device: str, dtype: torch.dtype
    ) -> None:
        """Make the weights on the device; `allocate` must follow before a run."""
        super().__init__()
        self.shapes = shapes
        self.embedding = nn.Embedding(shapes.vocabulary, shapes.hidden, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(
            _Block(shapes, linear, device=device, dtype=dtype) for _ in range(shapes.layers)
        )
        self.norm = nn.RMSNorm(shapes.hidden, device=device, dtype=dtype)
        self.head = linear(shapes.hidden, shapes.vocabulary)
        self.requires_grad_(requires_grad=False)

    def allocate(self, batch: int, capacity: int) -> None:
        """Make an empty cache for `batch` sequences of `capacity` tokens, and rotary tables."""
        weight = self.embedding.weight
        size = (batch, self.shapes.kv_heads, capacity, self.shapes.head_size)
        for block in self.blocks:
            for name in ("keys", "values"):
                cache = torch.zeros(size, device=weight.device, dtype=weight.dtype)
                block.register_buffer(name, cache, persistent=False)
        half = torch.arange(self.shapes.head_size // 2, device=weight.device)
        places = torch.arange(capacity, device=weight.device)
        angles = places[:, None] / _ROTARY_BASE ** (half * 2 / self.shapes.head_size)
        self.register_buffer("cos", angles.cos().to(weight.dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(weight.dtype), persistent=False)

    def free(self) -> None:
        """Drop the cache."""
        for block in self.blocks:
            block.register_buffer("keys", None, persistent=False)
            block.register_buffer("values", None, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run `ids` `[B, S]` at `positions` `[S]`; return the next token ids `[B]`.

        One token attends to all before it in the cache; more than one are a prompt that begins.
        """
        return self.logits(ids, positions).argmax(-1)

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the same; return the logits of each last token `[B, V]`."""
        mask = None
        if ids.shape[1] == 1:
            places = torch.arange(self.cos.shape[0], device=ids.device)
            mask = (places <= positions)[None, None, None]
        x: Tensor = self.embedding(ids)
        cos, sin = self.cos[positions], self.sin[positions]
        for block in self.blocks:
            x = block(x, positions, cos, sin, mask)
        head: Tensor = self.head(self.norm(x[:, -1]))
        return head


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, H, S, D]` by the angles `[S, D / 2]` of the tokens' positions."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
