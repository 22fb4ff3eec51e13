"""Activations that the export type cannot hold, found while calibration runs in float32."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn


@contextlib.contextmanager
def refuse_overflow(linears: Mapping[str, nn.Linear], dtype: torch.dtype) -> Iterator[None]:
    """Watch linears' inputs and outputs, and refuse values that the type cannot hold.

    Args:
        linears: Linears to watch, by name, in model order.
        dtype: Type of the exported model. Only float16 has a shorter range than float32.

    Raises:
        ModelError: afterwards, if a value was too large; names the first linear that met it.
    """
    if dtype != torch.float16:
        yield
        return
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            seen = max(value.abs().max().item() for value in (arguments[0], output))
            largest[name] = max(seen, largest.get(name, 0.0))

        return hook

    handles = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    _check(largest, linears, dtype)


def _check(
    largest: Mapping[str, float], linears: Mapping[str, nn.Linear], dtype: torch.dtype
) -> None:
    limit = torch.finfo(dtype).max
    over = [name for name in linears if largest.get(name, 0.0) > limit]
    if not over:
        return
    more = f" (and of {len(over) - 1} more linears)" if len(over) > 1 else ""
    raise ModelError(
        f"Activations overflow float16: those of {over[0]}{more} reach {largest[over[0]]:.3g} on "
        f"the calibration samples, and float16 ends at {limit:.0f}.",
        allowed="a type with the range of float32",
        fix="--dtype bfloat16, or --dtype float32",
    )
