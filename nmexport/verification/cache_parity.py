"""Find where two executors diverge: their caches compared layer by layer.

An engine returns nothing but logits and cache; a layer's keys and values are made of what the
layers before it computed, so the first that differ point at the place.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from nmexport.report.model import CacheError, CacheParity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

TOLERANCES = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}
"""Tolerance for rounding in a token's keys or values, by the type they are computed in."""
_NAME = re.compile(r"present\.(\d+)\.(key|value)")


def compare(left: Session, right: Session, *, dtype: str) -> CacheParity:
    """Compare the caches of two sessions that read the same tokens.

    Args:
        left: What is relied on.
        right: What is held against it.
        dtype: The type that they compute in.
    """
    tolerance = TOLERANCES[dtype]
    layers = [
        _cache_error(name, relative_error(expected, actual))
        for (name, expected), (_, actual) in zip(
            left.cache_values(left.cache), right.cache_values(right.cache), strict=True
        )
    ]
    # No error is what is not a number, and differs.
    first = next(
        (
            layer
            for layer in layers
            if layer.relative_error is None or layer.relative_error > tolerance
        ),
        None,
    )
    return CacheParity(layers=tuple(layers), first_diverging=first, tolerance=tolerance)


def compare_where_possible(
    executors: Mapping[str, Session], pair: tuple[str, str], why: Mapping[str, str], *, dtype: str
) -> CacheParity:
    """`compare` two of the executors, or say why not."""
    missing = next((name for name in pair if name not in executors), None)
    if missing is not None:
        return CacheParity(why=why[missing])
    left, right = (executors[name] for name in pair)
    if not (left.exposes_cache and right.exposes_cache):
        return CacheParity(why="one of the sessions does not expose its KV cache")
    return compare(left, right, dtype=dtype)


def relative_error(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Return the median over tokens of the relative difference; both `[B, H, P, D]`."""
    axes = (1, 3)
    difference = np.linalg.norm(wanted.astype(np.float64) - got, axis=axes)
    size = np.linalg.norm(wanted.astype(np.float64), axis=axes)
    return float(np.median(difference / np.maximum(size, np.finfo(np.float32).tiny)))


def _cache_error(name: str, error: float) -> CacheError:
    match = _NAME.fullmatch(name)
    layer, tensor = match.groups() if match else ("-1", name)
    return CacheError(
        layer=int(layer), tensor=tensor, relative_error=error if math.isfinite(error) else None
    )
