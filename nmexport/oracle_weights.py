"""The oracle's part on stored weights: what they mean, and operands in 8 bits.

As in `nmexport.oracle`, everything is NumPy and as plain as the op contract's words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

SCALE_GROUP = 16
LEVELS = 127
"""An operand in 8 bits lies between this and its negative."""
TIE_RTOL = 1e-5
"""A value this close to the middle of two levels may fall to either."""

INTEGER_TYPES: tuple[np.dtype[Any], ...] = (
    np.dtype(np.int8),
    np.dtype(ml_dtypes.int4),
    np.dtype(ml_dtypes.uint4),
)
STORED_TYPES: tuple[np.dtype[Any], ...] = (*INTEGER_TYPES, np.dtype(ml_dtypes.float8_e4m3fn))
"""Types of W beside X's own."""
_TWO_A_BYTE = INTEGER_TYPES[1:]

_Array = NDArray[Any]
_Float64 = NDArray[np.float64]


class RoundedOperand(NamedTuple):
    """Kept values in 8 bits, and what of them is open."""

    value: _Float64
    """`[..., K]`: `q * a / 127`; NaN in blocks that hold something not finite."""
    open_step: _Float64
    """`[..., K]`: one level, `a / 127`, where an executor may round the other way; else 0."""


def meant_weights(w: _Array, weight_scale: _Array | None, zero_point: _Array | None) -> _Float64:
    """Dequantise W: `(W[k, o] - zero_point[g, o]) * weight_scale[g, o]`, `[K, O]`.

    Args:
        w: `[K, O]`, floats or a stored type.
        weight_scale: `[G, O]`; None for floats.
        zero_point: `[G, O]` of w's type, or float32, or None.
    """
    wide: _Float64 = w.astype(np.float64)
    if weight_scale is None:
        return wide
    rows = len(w) // len(weight_scale)
    if zero_point is not None:
        wide = wide - np.repeat(zero_point.astype(np.float64), rows, axis=0)
    return wide * np.repeat(weight_scale.astype(np.float64), rows, axis=0)


def rounded_operand(s: _Float64, eta: _Float64, block: int) -> RoundedOperand:
    """Round what is kept to 8 bits, one scale a block of channels of a token.

    Args:
        s: `[..., K]`, 0 where dropped.
        eta: What was subtracted before, broadcastable to s: its error decides near ties too.
        block: Channels of a block.
    """
    blocks = s.reshape(*s.shape[:-1], -1, block)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    usable = np.isfinite(largest) & (largest > 0)
    divisor = np.where(usable, largest, 1.0)
    levels = np.where(usable, blocks * LEVELS / divisor, 0.0)
    step = largest / LEVELS
    rounded = np.rint(levels)  # half to even
    moved = np.abs(np.broadcast_to(eta, s.shape)).reshape(blocks.shape) * LEVELS / divisor
    from_tie = np.abs(np.abs(levels - np.trunc(levels)) - 0.5)
    is_open = usable & (from_tie <= TIE_RTOL * (np.abs(levels) + moved))
    return RoundedOperand(
        value=(rounded * step).reshape(s.shape),
        open_step=np.where(is_open, step, 0.0).reshape(s.shape),
    )


def check_weights(
    x_type: np.dtype[Any], w: _Array, weight_scale: _Array | None, zero_point: _Array | None
) -> None:
    """Check a weight `[K, O]` and its scales against the contract.

    Raises:
        ValueError: if types or shapes do not fit.
    """
    if w.dtype not in (x_type, *STORED_TYPES):
        allowed = ", ".join(str(allowed) for allowed in (x_type, *STORED_TYPES))
        raise ValueError(f"W is {w.dtype}; allowed: {allowed}")
    if (weight_scale is None) != (w.dtype == x_type):
        stored = ", ".join(str(stored) for stored in STORED_TYPES)
        raise ValueError(f"W is {w.dtype}; {stored} need weight_scale, and no other takes one")
    if weight_scale is None:
        if zero_point is not None:
            raise ValueError("weight_zero_point needs weight_scale")
        return
    in_features, out_features = w.shape
    groups = len(weight_scale)
    if w.dtype in _TWO_A_BYTE and out_features % 2:
        raise ValueError(f"W is {w.dtype} with {out_features} outputs; they must be even")
    if weight_scale.shape != (groups, out_features) or weight_scale.dtype not in (
        np.dtype(np.float32),
        x_type,
    ):
        raise ValueError(
            f"weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}; it must be float32 "
            f"or {x_type} [G, {out_features}]"
        )
    if groups != 1 and (in_features % groups or in_features // groups % SCALE_GROUP):
        raise ValueError(
            f"weight_scale has {groups} groups for {in_features} channels; a group has all of "
            f"them or a multiple of {SCALE_GROUP}"
        )
    if zero_point is not None:
        types = (w.dtype, np.dtype(np.float32)) if w.dtype in INTEGER_TYPES else (w.dtype,)
        if zero_point.shape != weight_scale.shape or zero_point.dtype not in types:
            raise ValueError(
                f"weight_zero_point is {zero_point.dtype} {list(zero_point.shape)}; it must be "
                f"{' or '.join(map(str, types))} {list(weight_scale.shape)}"
            )


def check_activations(w: _Array, weight_scale: _Array | None, bits: int, block: int) -> None:
    """Check the operand's rounding against the contract.

    Raises:
        ValueError: if W is no integer, or blocks do not fit its groups.
    """
    if bits not in {0, 8}:
        raise ValueError(f"activation_bits is {bits}; allowed: 0, 8")
    if bits == 0:
        return
    if w.dtype not in INTEGER_TYPES or weight_scale is None:
        raise ValueError(f"activation_bits = 8 takes a W of integers; this one is {w.dtype}")
    together = len(w) // len(weight_scale)
    if block < SCALE_GROUP or block % SCALE_GROUP or together % block:
        raise ValueError(
            f"activation_block is {block}; it must be a multiple of {SCALE_GROUP} that divides the "
            f"{together} channels that share a scale"
        )
