"""Torch tensors as ONNX tensors, materialised one by one while a file is written."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir import tensor_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


def deferred(read: Callable[[], torch.Tensor], *, like: torch.Tensor, name: str) -> ir.LazyTensor:
    """A tensor that `read` brings when it is needed and that is dropped afterwards.

    Args:
        read: Returns the tensor.
        like: A tensor of its type and shape (on the meta device, for instance).
        name: Name of the ONNX tensor.
    """
    return ir.LazyTensor(
        lambda: tensor_adapters.TorchTensor(read().contiguous(), name=name),
        dtype=tensor_adapters.from_torch_dtype(like.dtype),
        shape=ir.Shape(like.shape),
        name=name,
    )


def deferred_group(tensors: Mapping[str, torch.Tensor], *, prefix: str) -> dict[str, ir.LazyTensor]:
    """Tensors of a mapping that may read them as they are asked for: each is asked for again."""
    return {
        kind: deferred(
            functools.partial(tensors.__getitem__, kind), like=tensor, name=f"{prefix}.{kind}"
        )
        for kind, tensor in tensors.items()
    }
