"""Torch tensors as ONNX tensors, materialised one by one while a file is written."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import ml_dtypes
import onnx_ir as ir
from onnx_ir import tensor_adapters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


_IN_HALF_A_BYTE = {
    "int4": (ir.DataType.INT4, ml_dtypes.int4),
    "uint4": (ir.DataType.UINT4, ml_dtypes.uint4),
}


def defer(read: Callable[[], torch.Tensor], *, like: torch.Tensor, name: str) -> ir.LazyTensor:
    """Make a tensor that `read` loads when it is needed, and that is dropped afterwards.

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


def defer_group(
    tensors: Mapping[str, torch.Tensor], *, prefix: str, weight_type: str = "float"
) -> dict[str, ir.LazyTensor]:
    """Make lazy tensors of a mapping, which is asked for each one again.

    Args:
        tensors: Of one linear, by their names in the op contract.
        prefix: Its name.
        weight_type: Of `W` and its zero point: 4 bits are held in a byte of their own.
    """
    group = {
        kind: defer(
            functools.partial(tensors.__getitem__, kind), like=tensor, name=f"{prefix}.{kind}"
        )
        for kind, tensor in tensors.items()
    }
    if weight_type in _IN_HALF_A_BYTE:
        for kind in group.keys() & {"W", "weight_zero_point"}:
            if group[kind].dtype == ir.DataType.FLOAT:  # a zero point between the steps
                continue
            group[kind] = _halve(group[kind], *_IN_HALF_A_BYTE[weight_type])
    return group


def _halve(bytes_: ir.LazyTensor, dtype: ir.DataType, element: Any) -> ir.LazyTensor:
    """Pack the numbers into four bits each."""
    return ir.LazyTensor(
        lambda: ir.Tensor(bytes_.numpy().astype(element), dtype=dtype, name=bytes_.name),
        dtype=dtype,
        shape=bytes_.shape,
        name=bytes_.name,
    )
