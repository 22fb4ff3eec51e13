"""Tensors on a GPU that is not there: no values, but an op on two devices is refused as there."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """While this lasts tensors have no values, and `on_gpu` makes some that are on a GPU."""
    with FakeTensorMode():
        yield


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a tensor on the GPU."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def linear_on_gpu(inputs: int, outputs: int) -> torch.nn.Linear:
    """Make a linear on the GPU."""
    linear = torch.nn.Linear(inputs, outputs, device="meta")
    linear.weight = torch.nn.Parameter(on_gpu(outputs, inputs), requires_grad=False)
    linear.bias = torch.nn.Parameter(on_gpu(outputs), requires_grad=False)
    return linear
