"""The tensors of a TensorRT engine: their types, and the cache among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nmexport.errors import ArtifactError

_PAST, _PRESENT = "past_key_values.", "present."
_CACHE_RANK = 4
# TensorRT's names of element types, and NumPy's; bfloat16 has none there: the bits.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
}


@dataclass(frozen=True, kw_only=True)
class CacheSlot:
    """One past input and the present output that follows it."""

    past: str
    present: str
    heads: int
    head_size: int
    itemsize: int

    def bytes_of(self, batch: int, tokens: int) -> int:
        """Bytes of `tokens` tokens of each sequence of a batch."""
        return batch * self.heads * tokens * self.head_size * self.itemsize

    def shape(self, batch: int, tokens: int) -> tuple[int, int, int, int]:
        """Shape of the same: `[batch, heads, tokens, head_size]`."""
        return batch, self.heads, tokens, self.head_size


def tensor_types(engine: Any) -> dict[str, str]:
    """Return TensorRT's name of the element type of every input and output."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return {name: str(engine.get_tensor_dtype(name)).rpartition(".")[2] for name in names}


def cache_slots(engine: Any, types: dict[str, str]) -> tuple[CacheSlot, ...]:
    """Pair every past input of an engine with the present output that follows it.

    Raises:
        ArtifactError: if the cache has foreign names or another rank.
    """
    slots = []
    for name, kind in types.items():
        if not name.startswith(_PAST):
            continue
        present = name.replace(_PAST, _PRESENT, 1)
        shape = tuple(engine.get_tensor_shape(name))
        if present not in types or len(shape) != _CACHE_RANK:
            raise ArtifactError(
                f"Cache input {name} has shape {shape} and no match among the outputs.",
                allowed=f"{_PAST}N.key|value [batch, heads, tokens, size] with {present}",
            )
        slots.append(
            CacheSlot(
                past=name,
                present=present,
                heads=int(shape[1]),
                head_size=int(shape[3]),
                itemsize=NUMPY_TYPES[kind].itemsize,
            )
        )
    return tuple(slots)
