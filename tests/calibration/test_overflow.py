"""Activations beyond 65504: said before anything is folded, with the layer."""

from __future__ import annotations

import pytest
import torch
from nmexport.calibration.overflow import refuse_overflow
from nmexport.errors import ModelError
from torch import nn


def run(scale: float, dtype: torch.dtype) -> None:
    first, second, third = (nn.Linear(4, 4, bias=False) for _ in range(3))
    with torch.no_grad():
        for linear in (first, second, third):
            linear.weight.copy_(torch.eye(4))
        second.weight.mul_(scale)
    linears = {"up": first, "down": second, "head": third}
    with refuse_overflow(linears, dtype):
        third(second(first(torch.ones(1, 4))))
    assert not second._forward_hooks


def test_the_first_layer_that_overflows_is_named() -> None:
    with pytest.raises(ModelError, match=r"those of down \(and of 1 more linears\) reach 1e\+05"):
        run(1e5, torch.float16)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e4, torch.float16), (1e5, torch.bfloat16), (1e5, torch.float32)]
)
def test_what_fits_passes(scale: float, dtype: torch.dtype) -> None:
    run(scale, dtype)
