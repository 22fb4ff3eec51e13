"""Find where two executors diverge: their caches compared layer by layer.

An engine returns nothing but logits and cache; a layer's keys and values are made of what the
layers before it computed, so the first that differ point at the place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from nmexport.runtimes.session import Session

TOLERANCES = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}
"""Tolerance for rounding in a token's keys or values, by the type they are computed in."""
_NAME = re.compile(r"present\.(\d+)\.(key|value)")


def absent(why: str) -> dict[str, Any]:
    """The report's form where nothing could be compared."""
    return {"layers": [], "first_diverging": None, "why": why}


def compare(left: Session, right: Session, *, dtype: str) -> dict[str, Any]:
    """The report's `parity.caches` of two sessions that read the same tokens.

    Args:
        left: What is relied on.
        right: What is held against it.
        dtype: The type that they compute in.
    """
    tolerance = TOLERANCES[dtype]
    layers = [
        {**_place(name), "relative_error": relative_error(wanted, got)}
        for (name, wanted), (_, got) in zip(
            left.cache_values(left.cache), right.cache_values(right.cache), strict=True
        )
    ]
    # Not a comparison that holds for what is not a number.
    beyond = (layer for layer in layers if not layer["relative_error"] <= tolerance)
    return {"layers": layers, "first_diverging": next(beyond, None), "tolerance": tolerance}


def compare_where_possible(
    executors: Mapping[str, Session], pair: tuple[str, str], why: Mapping[str, str], *, dtype: str
) -> dict[str, Any]:
    """`compare` two of the executors, or say why not."""
    missing = next((name for name in pair if name not in executors), None)
    if missing is not None:
        return absent(why[missing])
    left, right = (executors[name] for name in pair)
    if not (left.exposes_cache and right.exposes_cache):
        return absent("one of the sessions does not expose its KV cache")
    return compare(left, right, dtype=dtype)


def relative_error(wanted: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Median over tokens of the difference's norm over the norm; both `[B, H, P, D]`."""
    axes = (1, 3)
    difference = np.linalg.norm(wanted.astype(np.float64) - got, axis=axes)
    size = np.linalg.norm(wanted.astype(np.float64), axis=axes)
    return float(np.median(difference / np.maximum(size, np.finfo(np.float32).tiny)))


def _place(name: str) -> dict[str, Any]:
    match = _NAME.fullmatch(name)
    layer, tensor = match.groups() if match else ("-1", name)
    return {"layer": int(layer), "tensor": tensor}
