"""Blocks of a GGUF taken apart into integers, scales and minima: no value is rounded.

A row `[K]` of a tensor is a run of blocks; a block holds 32 or 256 values, in sub-blocks of 16 or
32 that share a scale. A weight is `scale * value - minimum`, where a type has minima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmexport.sparsity.quantisation import QuantisedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from nmexport.sparsity.weight_form import StoredType


_HIGH = np.uint8(4)  # bits above the low four


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """Contents of `n` blocks of one type."""

    values: NDArray[np.int8]
    """`[n, values of a block]`."""
    scale: NDArray[np.float32]
    """`[n, sub-blocks]`."""
    minimum: NDArray[np.float32] | None = None
    """`[n, sub-blocks]`, subtracted."""


def kept_type(name: str) -> StoredType | None:
    """The op's type that holds a GGUF type's values exactly; None where there is none."""
    return _TYPES[name][0] if name in _TYPES else None


def gguf_weight(data: NDArray[np.uint8], name: str) -> QuantisedWeight:
    """Take a tensor's blocks apart.

    Args:
        data: `[O, bytes of a row]`, as the file holds it.
        name: Its GGUF type, one that `kept_type` knows.
    """
    kind, block_bytes, read = _TYPES[name]
    rows = len(data)
    blocks = read(data.reshape(-1, block_bytes))

    def by_group(part: NDArray[Any]) -> torch.Tensor:
        """`[blocks, n]` -> `[groups of a row, O]`."""
        return torch.from_numpy(part.reshape(rows, -1).T.copy())

    values, scale = by_group(blocks.values), by_group(blocks.scale)
    if blocks.minimum is None:
        return QuantisedWeight(values=values, scale=scale, type=kind)
    values, scale, zero_point = _with_zero_points(values, scale, by_group(blocks.minimum))
    return QuantisedWeight(values=values, scale=scale, type=kind, zero_point=zero_point)


def _with_zero_points(
    values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`scale * value - minimum` as `(value - zero point) * scale`.

    The zero point is `minimum / scale`, one float32 division. A group of equal weights has no
    scale: it becomes `(0 + 1) * -minimum`, which is the same number.
    """
    flat = scale == 0
    zero_point = torch.where(flat, -1.0, minimum / torch.where(flat, 1.0, scale))
    scale = torch.where(flat, -minimum, scale)
    by_channel = flat.repeat_interleave(len(values) // len(scale), dim=0)
    return torch.where(by_channel, torch.zeros_like(values), values), scale, zero_point


def _fields(packed: NDArray[np.uint8], bits: int, run: int) -> NDArray[np.uint8]:
    """Values of a few bits: in each run of bytes first the lowest bits of all, then the next.

    Args:
        packed: `[n, B]`.
        bits: Bits of a value.
        run: Bytes of a run; divides B.

    Returns:
        `[n, B * 8 // bits]`.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    split = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (split & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def _float16(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """`[n, 2]` bytes -> `[n, 1]`."""
    wide: NDArray[np.float32] = packed.copy().view(np.float16).astype(np.float32)
    return wide


def _split(blocks: NDArray[np.uint8], *sizes: int) -> list[NDArray[np.uint8]]:
    """Cut blocks at the ends of parts of so many bytes."""
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _to_signed(values: NDArray[np.uint8], offset: int = 0) -> NDArray[np.int8]:
    return (values.astype(np.int16) - offset).astype(np.int8)


def _q8_0(blocks: NDArray[np.uint8]) -> _Blocks:
    d, values = _split(blocks, 2)
    return _Blocks(values=values.copy().view(np.int8), scale=_float16(d))


def _q4_0(blocks: NDArray[np.uint8]) -> _Blocks:
    d, low = _split(blocks, 2)
    return _Blocks(values=_to_signed(_fields(low, 4, 16), 8), scale=_float16(d))


def _q4_1(blocks: NDArray[np.uint8]) -> _Blocks:
    d, m, low = _split(blocks, 2, 2)
    return _Blocks(values=_to_signed(_fields(low, 4, 16)), scale=_float16(d), minimum=-_float16(m))


def _five(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Values of the types with 32 fifth bits in four bytes."""
    bits = np.unpackbits(high, axis=1, bitorder="little")
    return _fields(low, 4, 16) | bits << _HIGH


def _q5_0(blocks: NDArray[np.uint8]) -> _Blocks:
    d, high, low = _split(blocks, 2, 4)
    return _Blocks(values=_to_signed(_five(high, low), 16), scale=_float16(d))


def _q5_1(blocks: NDArray[np.uint8]) -> _Blocks:
    d, m, high, low = _split(blocks, 2, 2, 4)
    return _Blocks(values=_to_signed(_five(high, low)), scale=_float16(d), minimum=-_float16(m))


def _q2_k(blocks: NDArray[np.uint8]) -> _Blocks:
    both, low, d, d_minimum = _split(blocks, 16, 64, 2)
    return _Blocks(
        values=_to_signed(_fields(low, 2, 32)),
        scale=_float16(d) * (both & 15),
        minimum=_float16(d_minimum) * (both >> 4),
    )


def _q3_k(blocks: NDArray[np.uint8]) -> _Blocks:
    high, low, packed, d = _split(blocks, 32, 64, 12)
    scales = _fields(packed[:, :8], 4, 8) | _fields(packed[:, 8:], 2, 4) << _HIGH
    values = _fields(low, 2, 32) | _fields(high, 1, 32) << np.uint8(2)
    return _Blocks(values=_to_signed(values, 4), scale=_float16(d) * _to_signed(scales, 32))


def _scales_and_minima(
    d: NDArray[np.uint8], d_minimum: NDArray[np.uint8], packed: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Eight scales and minima of six bits each in twelve bytes."""
    first, second, both = np.split(packed, 3, axis=1)
    scales = np.hstack([first & 63, both & 15 | first >> 6 << _HIGH])
    minima = np.hstack([second & 63, both >> 4 | second >> 6 << _HIGH])
    return _float16(d) * scales, _float16(d_minimum) * minima


def _q4_k(blocks: NDArray[np.uint8]) -> _Blocks:
    d, d_minimum, packed, low = _split(blocks, 2, 2, 12)
    scale, minimum = _scales_and_minima(d, d_minimum, packed)
    return _Blocks(values=_to_signed(_fields(low, 4, 32)), scale=scale, minimum=minimum)


def _q5_k(blocks: NDArray[np.uint8]) -> _Blocks:
    d, d_minimum, packed, high, low = _split(blocks, 2, 2, 12, 32)
    scale, minimum = _scales_and_minima(d, d_minimum, packed)
    values = _fields(low, 4, 32) | _fields(high, 1, 32) << _HIGH
    return _Blocks(values=_to_signed(values), scale=scale, minimum=minimum)


def _q6_k(blocks: NDArray[np.uint8]) -> _Blocks:
    low, high, scales, d = _split(blocks, 128, 64, 16)
    values = _fields(low, 4, 64) | _fields(high, 2, 32) << _HIGH
    return _Blocks(values=_to_signed(values, 32), scale=_float16(d) * scales.copy().view(np.int8))


def _levels(index: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Values of the types that choose from a table of sixteen."""
    from gguf.quants import IQ4_NL

    return np.asarray(IQ4_NL.kvalues, np.int8)[index]


def _iq4_nl(blocks: NDArray[np.uint8]) -> _Blocks:
    d, low = _split(blocks, 2)
    return _Blocks(values=_levels(_fields(low, 4, 16)), scale=_float16(d))


def _iq4_xs(blocks: NDArray[np.uint8]) -> _Blocks:
    d, high, low, index = _split(blocks, 2, 2, 4)
    scales = _fields(low, 4, 1) | _fields(high, 2, 1) << _HIGH
    return _Blocks(
        values=_levels(_fields(index, 4, 16)), scale=_float16(d) * _to_signed(scales, 32)
    )


_TYPES: Mapping[str, tuple[StoredType, int, Callable[[NDArray[np.uint8]], _Blocks]]] = {
    "Q8_0": ("int8", 34, _q8_0),
    "Q4_0": ("int4", 18, _q4_0),
    "Q4_1": ("uint4", 20, _q4_1),
    "Q5_0": ("int8", 22, _q5_0),
    "Q5_1": ("int8", 24, _q5_1),
    "Q2_K": ("uint4", 84, _q2_k),
    "Q3_K": ("int4", 110, _q3_k),
    "Q4_K": ("uint4", 144, _q4_k),
    "Q5_K": ("int8", 176, _q5_k),
    "Q6_K": ("int8", 210, _q6_k),
    "IQ4_NL": ("int8", 18, _iq4_nl),
    "IQ4_XS": ("int8", 136, _iq4_xs),
}
