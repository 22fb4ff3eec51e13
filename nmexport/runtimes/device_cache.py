"""Caches in memory of the device: buffers that runs write in place, and who may go on from which.

Buffers are kept when a sequence ends, and given to the next one: what was recorded on them stays
good. A cache is the beginning of some buffers. Two runs that go on from one cache cannot both
write behind it, so the second gets a copy.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import onnxruntime
from nmexport.errors import ArtifactError
from nmexport.runtimes.feeds import float32_from
from nmexport.runtimes.onnxruntime_opening import NUMPY_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_BUCKET = 512
"""Capacities are this times a power of two: few shapes, few graphs, and growth is rare."""
_HEADROOM = 128
"""Tokens that new buffers have room for beyond what is put into them: a prompt whose length is a
capacity would grow at its first answer token."""

Device = Literal["cuda", "cpu"]


@dataclass(eq=False)
class Buffers:
    """Device memory of one batch of sequences."""

    batch: int
    capacity: int
    """Tokens of a sequence."""
    values: tuple[Any, ...]
    """One OrtValue `[B, H, capacity, D]` for each past input."""


@dataclass(eq=False)
class Lease:
    """Holds buffers until the last cache that uses them is dropped."""

    buffers: Buffers
    tip: weakref.ref[DeviceCache] | None = None
    """The cache that was written last; None once nobody holds it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceCache:
    """The first `lengths` tokens in some buffers; runs that go on from it write behind."""

    lease: Lease
    lengths: NDArray[np.int32]
    """Tokens of each sequence `[B]`."""


@dataclass(frozen=True, kw_only=True)
class CacheTensor:
    """One past input, and the present output that is bound to the same memory."""

    past: str
    present: str
    heads: int
    head_dim: int
    type: str
    """The runtime's name of the element type."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one sequence takes."""
        return self.heads * self.head_dim * NUMPY_TYPES[self.type].itemsize


@dataclass
class _Pool:
    """Buffers that no cache uses, by batch and capacity."""

    free: dict[tuple[int, int], list[Buffers]] = field(default_factory=dict)

    def put(self, buffers: Buffers) -> None:
        self.free.setdefault((buffers.batch, buffers.capacity), []).append(buffers)

    def take(self, batch: int, capacity: int) -> Buffers | None:
        waiting = self.free.get((batch, capacity))
        return waiting.pop() if waiting else None


class DeviceCaches:
    """All buffers of one session."""

    def __init__(self, tensors: Sequence[CacheTensor], *, positions: int, device: Device) -> None:
        """Start without buffers.

        Args:
            tensors: What a cache is made of.
            positions: Tokens that a sequence may have.
            device: Where buffers lie.
        """
        self._tensors = tensors
        self._positions = positions
        self._device = device
        self._pool = _Pool()

    def values(self, cache: DeviceCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield what a cache holds, by the names of the outputs, `[B, H, length, D]`."""
        length = int(cache.lengths.max())
        for tensor, value in zip(self._tensors, cache.lease.buffers.values, strict=True):
            elements = value.numpy()[:, :, :length]
            yield tensor.present, float32_from(elements, is_bfloat16=is_bfloat16(tensor.type))

    def keep(self, cache: DeviceCache) -> DeviceCache:
        """Copy full buffers now, not again in each run that continues them."""
        length = int(cache.lengths.max())
        if length < min(cache.lease.buffers.capacity, self._positions):
            return cache
        lease = self._copy_of(cache.lease.buffers, length + 1)
        return DeviceCache(lease=lease, lengths=cache.lengths)

    def clear(self) -> None:
        """Drop the buffers that no cache uses."""
        self._pool.free.clear()

    def lease_for(self, cache: DeviceCache | None, batch: int, length: int) -> Lease:
        """Provide buffers with room for `length` tokens, filled with the cache.

        Raises:
            ArtifactError: if the model's tables end before.
        """
        if length > self._positions:
            raise ArtifactError(
                f"{length} tokens are more than this engine covers.",
                allowed=f"up to {self._positions} tokens, prompt and answer together",
            )
        if cache is None:
            return self._lease(self._fresh_buffers(batch, _capacity_for(length + _HEADROOM)))
        held = cache.lease.buffers
        tip = cache.lease.tip() if cache.lease.tip else None
        if length <= held.capacity and (tip is None or tip is cache):
            return cache.lease
        # Full, or somebody still holds a cache that went on from this one.
        return self._copy_of(held, max(length, held.capacity))

    def _copy_of(self, held: Buffers, length: int) -> Lease:
        """Copy buffers into others with room for so many tokens."""
        copied = self._fresh_buffers(held.batch, _capacity_for(length))
        for old, new in zip(held.values, copied.values, strict=True):
            # By way of the host: a few milliseconds each time that a text doubles.
            room = new.numpy()
            room[:, :, : held.capacity] = old.numpy()
            new.update_inplace(room)
        return self._lease(copied)

    def _fresh_buffers(self, batch: int, capacity: int) -> Buffers:
        waiting = self._pool.take(batch, capacity)
        if waiting is not None:
            return waiting
        values = zero_buffers(self._tensors, batch, capacity, self._device)
        return Buffers(batch, capacity, values)

    def _lease(self, buffers: Buffers) -> Lease:
        """Lend buffers until the last cache that uses them is dropped."""
        lease = Lease(buffers)
        weakref.finalize(lease, self._pool.put, buffers)
        return lease


def on_device(array: NDArray[Any], device: Device) -> Any:
    """Copy an array into an OrtValue of the device."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)


def is_bfloat16(name: str) -> bool:
    """Tell by the runtime's name of an element type; NumPy has none for it."""
    return name == "tensor(bfloat16)"


def _capacity_for(length: int) -> int:
    capacity = _BUCKET
    while capacity < length:
        capacity *= 2
    return capacity


def zero_buffers(
    tensors: Sequence[CacheTensor], batch: int, capacity: int, device: Device
) -> tuple[Any, ...]:
    """Make one OrtValue `[B, H, capacity, D]` for each tensor of a cache.

    Zeros, since what an attention kernel reads behind the end must at least be finite.
    """
    return tuple(
        on_device(
            np.zeros((batch, tensor.heads, capacity, tensor.head_dim), NUMPY_TYPES[tensor.type]),
            device,
        )
        for tensor in tensors
    )


def cache_tensors(session: onnxruntime.InferenceSession) -> tuple[CacheTensor, ...]:
    """Read what a session's caches hold from its inputs `past_key_values.{i}.key` and `.value`."""
    return tuple(
        CacheTensor(
            past=value.name,
            present=value.name.replace("past_key_values.", "present.", 1),
            heads=value.shape[1],
            head_dim=value.shape[3],
            type=value.type,
        )
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    )
