"""Balancing an operand and its weight before both are rounded."""

from __future__ import annotations

import torch
from nmexport.sparsity.balance import balancing_factors
from nmexport.sparsity.quantisation import rounded
from nmexport.sparsity.rounding import quantised
from nmexport.sparsity.weight_form import WeightForm


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product_error(x: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor) -> float:
    """Mean square error of a product whose sides are both rounded, over that of the product."""
    stored = quantised(weight / factors.unsqueeze(1), WeightForm("int8", None), name="layer")
    made = rounded(x * factors, 32) @ stored.dequantised()
    wanted = x @ weight
    return float((made - wanted).square().mean() / wanted.square().mean())


def test_a_strong_channel_no_longer_drowns_its_block():
    """Channels of many sizes, as those of a norm's output are."""
    sizes = torch.exp(1.5 * normals(128, seed=1))
    x, weight = normals(400, 128, seed=2) * sizes, normals(128, 48, seed=3)
    factors = balancing_factors(x.square().mean(dim=0).sqrt(), weight.norm(dim=1))
    assert product_error(x, weight, factors) < 0.6 * product_error(x, weight, torch.ones(128))


def test_factors_follow_both_sides_and_no_unit():
    strengths, norms = torch.tensor([1.0, 16.0, 1.0]), torch.tensor([1.0, 1.0, 16.0])
    factors = balancing_factors(strengths, norms)
    torch.testing.assert_close(factors / factors[0], torch.tensor([1.0, 0.5, 2.0]))
    torch.testing.assert_close(balancing_factors(1e3 * strengths, 1e-3 * norms), factors)


def test_a_channel_without_input_or_weights_stays_as_it_is():
    factors = balancing_factors(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 2.0]))
    assert factors.isfinite().all()
    assert factors[:2].tolist() == [1.0, 1.0]
    assert balancing_factors(torch.zeros(4), torch.zeros(4)).tolist() == [1.0] * 4


def test_factors_are_bounded():
    factors = balancing_factors(torch.tensor([1e-30, 1.0, 1.0]), torch.ones(3))
    assert 1 / 33 < float(factors.min()) <= float(factors.max()) < 33
