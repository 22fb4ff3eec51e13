"""Weights that are stored in few bits, and operands in 8: what their numbers stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nmexport.sparsity.weight_form import GROUP, STORED_TYPES

if TYPE_CHECKING:
    from nmexport.sparsity.weight_form import StoredType

VALUE_RANGES = {"int8": (-128, 127), "int4": (-8, 7), "uint4": (0, 15)}

LEVELS = 127
"""An operand in 8 bits lies between this and its negative."""

ROW_GROUP = 32
"""Columns of an embedding's row that share a scale, where they divide its width."""


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight as it is stored: `(values - zero_point) * scale`, both repeated along K.

    Raises:
        ValueError: if tensors do not fit each other or the type.
    """

    values: torch.Tensor
    """`[K, O]` int8, also where the type has 4 bits; or float8_e4m3fn. Gathered order."""
    scale: torch.Tensor
    """`[G, O]`, float32 or the model's type; G is 1, or K / G a multiple of 16."""
    type: StoredType
    zero_point: torch.Tensor | None = None
    """`[G, O]`, of the type of `values`, or float32: GGUF's minima are no whole steps. None is
    zero."""
    channel_order: torch.Tensor | None = None
    """`[K]` int32: row k of `values` meets channel `channel_order[k]` of the linear's input; None
    is the identity. GPTQ's act-order is one: sorted by group, so that groups are consecutive."""

    def __post_init__(self) -> None:
        """Hold the tensors against each other and the type."""
        channels, outputs = self.values.shape
        groups = len(self.scale)
        dtype = torch.float8_e4m3fn if self.type == "float8e4m3fn" else torch.int8
        if self.type not in STORED_TYPES or self.values.dtype != dtype:
            raise ValueError(f"{self.type} weights are held in {dtype}, not {self.values.dtype}")
        if groups != 1 and (channels % groups or channels // groups % GROUP):
            raise ValueError(f"{groups} groups of scales for {channels} channels")
        if self.type in {"int4", "uint4"} and outputs % 2:
            raise ValueError(f"{self.type} lies two a byte along the outputs; they are {outputs}")
        points = self.scale if self.zero_point is None else self.zero_point
        if self.scale.shape != (groups, outputs) or points.shape != self.scale.shape:
            raise ValueError(f"scale and zero point are not [{groups}, {outputs}]")
        if points.dtype not in {dtype, torch.float32}:
            raise ValueError(f"the zero point is {points.dtype}, not {dtype} or float32")
        whole = [self.values] + [points] * (points.dtype == dtype)
        if not all(_fits(tensor, self.type) for tensor in whole):
            raise ValueError(f"a value leaves the range of {self.type}")

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return 4 if self.type in {"int4", "uint4"} else 8

    def dequantised(self) -> torch.Tensor:
        """The weight meant, `[K, O]` float32, in the input's own channel order."""
        gathered = dequantised(self.values, self.scale, self.zero_point)
        if self.channel_order is None:
            return gathered
        return gathered[torch.argsort(self.channel_order.long())]


def _fits(values: torch.Tensor, type_: StoredType) -> bool:
    """Tell whether all values of a tensor are ones of a type."""
    if type_ not in VALUE_RANGES or values.numel() == 0:
        return True
    least, most = VALUE_RANGES[type_]
    return least <= int(values.min()) and int(values.max()) <= most


def row_groups(width: int) -> int:
    """Count the scales of an embedding's row, `width` columns wide.

    One scale for all of a row is too coarse: a few columns are far larger than the rest, and what
    their scale rounds away moves the masks of all layers (SmolLM2 at 8:16: perplexity 1.18 times
    as high).
    """
    return width // ROW_GROUP if width % ROW_GROUP == 0 else 1


def rounded_rows(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round an embedding to 8 bits, a scale for each group of columns of a row.

    Args:
        table: `[V, H]` T.

    Returns:
        `[V, H]` int8, and `[V, G]` T with G of `row_groups`.
    """
    groups = row_groups(table.shape[1])
    grouped = table.float().reshape(len(table), groups, -1)
    # The scale that is stored is the one that counts.
    scale = (grouped.abs().amax(dim=2) / LEVELS).to(table.dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = (grouped / scale.float().unsqueeze(2)).round().clamp(-LEVELS, LEVELS)
    return levels.to(torch.int8).reshape(table.shape), scale


def dequantised(
    weight: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Dequantise a weight `[K, O]` to float32.

    Args:
        weight: The stored values, or floats.
        scale: `[G, O]`, or None for floats.
        zero_point: `[G, O]` of the weight's type, or float32; None for zero.
    """
    wide = weight.to(torch.float32)
    if scale is None:
        return wide
    grouped = wide.reshape(scale.shape[0], -1, weight.shape[1])
    if zero_point is not None:
        grouped = grouped - zero_point.to(torch.float32).unsqueeze(1)
    return (grouped * scale.to(torch.float32).unsqueeze(1)).reshape(weight.shape)


def rounded(operand: torch.Tensor, block: int) -> torch.Tensor:
    """Round an operand `[..., K]` float32 to 8 bits, with a scale for each block of channels.

    Values stay floats: `q * a / 127`, with a the block's largest magnitude. A block that holds
    something not finite holds NaN afterwards, or where it is multiplied.
    """
    blocks = operand.reshape(*operand.shape[:-1], operand.shape[-1] // block, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # The quotient first: times 127, a float32 may overflow.
    shares = blocks / torch.where(largest > 0, largest, 1.0)
    return ((shares * LEVELS).round() * (largest / LEVELS)).reshape(operand.shape)
