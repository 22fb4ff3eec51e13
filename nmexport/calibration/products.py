"""Products in bfloat16 where this machine multiplies it fast: for what needs no float32.

Learning's gradients, text that a model writes and averages over many tokens are of that kind;
errors and scores are not.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nmexport.models.offload import is_placed
from nmexport.models.swap import swapped
from nmexport.sparsity.linear import bias_of
from nmexport.sparsity.targets import linears_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# Below, a model's products are no work, and a copy of its weights is for nothing.
_LEAST_PARAMETERS = 1_000_000
# On a host, beyond that the copy is more memory than was counted on: 4 GB. On a GPU
# `offload.device_bytes_needed` counts it.
_MOST_PARAMETERS = 2_000_000_000


def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where its products are faster than float32's."""
    if device.type == "cuda":
        return torch.bfloat16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return torch.bfloat16 if fast else torch.float32


class _FastLinear(nn.Module):
    """A linear whose product is in another type than its input and output."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self._weight = linear.weight.detach().to(dtype)
        self._bias = bias_of(linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., O]`, in the type of x."""
        y = nn.functional.linear(x.to(self._weight.dtype), self._weight).to(x.dtype)
        return y if self._bias is None else y + self._bias


@contextlib.contextmanager
def fast_products(
    model: Any, *, least_parameters: int = _LEAST_PARAMETERS
) -> Iterator[torch.dtype]:
    """Run the linears of a float32 model on faster products.

    Args:
        model: A Hugging Face causal language model; one that Accelerate placed is left alone, its
            weights may be elsewhere.
        least_parameters: Of its linears; smaller models are left alone, and so are large ones on a
            host, whose weights there may be no memory for twice.

    Yields:
        The type of the products.
    """
    if is_placed(model) or model.dtype != torch.float32:
        yield model.dtype
        return
    linears = linears_of(model)
    dtype = fast_dtype(model.device)
    size = sum(linear.weight.numel() for linear in linears.values())
    most = size if model.device.type == "cuda" else _MOST_PARAMETERS
    if dtype == torch.float32 or not least_parameters <= size <= most:
        yield model.dtype
        return
    with swapped(model, {name: _FastLinear(linear, dtype) for name, linear in linears.items()}):
        yield dtype
