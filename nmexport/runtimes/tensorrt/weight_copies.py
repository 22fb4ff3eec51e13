"""Counts how often each weight of a graph is in a plan, by its own bytes.

A plan's format is nobody's business, but a weight that is stored as it was given is found by a
sample of itself; and a second copy is found as surely as the first, however large the rest is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

_SAMPLE = 64
_KEY = 8  # bytes that a place is recognised by, before the whole sample is compared
_DISTINCT = 16  # byte values in a sample: of fewer, such as of zeros, there may be many
_TRIES = 8
_CHUNK = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Weight:
    """An initializer of a graph."""

    name: str
    size: int
    """Bytes."""
    sample: bytes | None
    """Some of its bytes; None where it has none that tell it apart."""


def weights_of(model: ir.Model) -> tuple[Weight, ...]:
    """List all initializers; read only a sample of each."""
    return tuple(
        Weight(name=name, size=value.const_value.nbytes, sample=_sample(value.const_value))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    )


def copies(plan: bytes, weights: Iterable[Weight]) -> dict[str, int]:
    """Count how often each weight is in a plan.

    Weights of equal contents share what is found: each counts its part, rounded up. One that has no
    sample is left out.
    """
    alike: defaultdict[bytes, list[str]] = defaultdict(list)
    for weight in weights:
        if weight.sample is not None:
            alike[weight.sample].append(weight.name)
    counts = _count(plan, list(alike))
    return {
        name: -(-counts[sample] // len(names)) for sample, names in alike.items() for name in names
    }


def find_repeated(counted: Mapping[str, int]) -> list[str]:
    """List the weights that are in a plan more than once."""
    return sorted(name for name, count in counted.items() if count > 1)


def _sample(tensor: ir.TensorProtocol) -> bytes | None:
    array = tensor.numpy()
    if not array.flags.c_contiguous or array.nbytes < 2 * _SAMPLE:
        return None
    whole = array.reshape(-1).view(np.uint8)
    step = max((array.nbytes - _SAMPLE) // _TRIES // _SAMPLE * _SAMPLE, _SAMPLE)
    for start in range(step, array.nbytes - _SAMPLE + 1, step):
        sample = whole[start : start + _SAMPLE].tobytes()
        if len(set(sample)) >= _DISTINCT and any(sample[:2]):
            return sample
    return None


def _count(plan: bytes, samples: Sequence[bytes]) -> Counter[bytes]:
    """Count each sample in one pass over the plan, however many there are."""
    known: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for sample in samples:
        known[sample[:_KEY]].append(sample)
    counts: Counter[bytes] = Counter()
    for at in _places(plan, list(known)):
        for sample in known[plan[at : at + _KEY]]:
            counts[sample] += plan.startswith(sample, at)
    return counts


def _places(plan: bytes, keys: Sequence[bytes]) -> Iterator[int]:
    """Find the keys: look up their first two bytes, then compare the whole."""
    is_first = np.zeros(1 << 16, dtype=bool)
    is_first[[int.from_bytes(key[:2], "little") for key in keys]] = True
    wanted = np.array([int.from_bytes(key, "little") for key in keys], dtype=np.uint64)
    for begin in range(0, len(plan), _CHUNK):
        for shift in (0, 1):  # pairs of bytes at even places, then at odd ones
            start = begin + shift
            # A key that begins in this chunk may end in the next one; it is found here alone.
            end = min(begin + _CHUNK + _KEY - 1, len(plan))
            pairs = np.frombuffer(plan, "<u2", count=max(end - start, 0) // 2, offset=start)
            yield from start + 2 * _hits(pairs, is_first, wanted)


def _hits(
    pairs: NDArray[np.uint16], is_first: NDArray[np.bool_], wanted: NDArray[np.uint64]
) -> NDArray[np.int64]:
    last = len(pairs) - _KEY // 2
    (likely,) = np.nonzero(is_first[pairs[: last + 1]]) if last >= 0 else (np.empty(0, np.int64),)
    values = np.zeros(len(likely), np.uint64)
    for part in range(_KEY // 2):
        values |= pairs[likely + part].astype(np.uint64) << np.uint64(16 * part)
    return likely[np.isin(values, wanted)]
