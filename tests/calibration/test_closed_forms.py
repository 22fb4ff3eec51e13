"""Least squares against what NumPy finds, and against noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nmexport.calibration.closed_forms import Moments, compensation, gain_and_bias

TOKENS, CHANNELS, OUTPUTS = 400, 12, 7


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kept() -> torch.Tensor:
    return drawn(TOKENS, CHANNELS) * torch.linspace(0.1, 3, CHANNELS) + 0.3


def affine() -> torch.Tensor:
    return drawn(CHANNELS + 1, OUTPUTS, seed=1).double()


def moments_of(kept: torch.Tensor, target: torch.Tensor) -> Moments:
    moments = Moments.empty(CHANNELS, {"one": OUTPUTS})
    for rows in (slice(0, 150), slice(150, None)):
        moments.add(kept[rows], {"one": target[rows]})
    assert moments.tokens == TOKENS
    return moments


def applied(kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return kept.double() @ weight[:-1] + weight[-1]


@pytest.mark.parametrize(("gains", "biases"), [(True, True), (True, False), (False, True)])
def test_gain_and_bias_are_numpys(kept: torch.Tensor, gains: bool, biases: bool) -> None:
    weight = affine()
    y = applied(kept, weight)
    target = (1.5 * y + 0.7 + 0.2 * drawn(TOKENS, OUTPUTS, seed=2)).float()
    gain, bias = gain_and_bias(moments_of(kept, target), "one", weight, gains=gains, biases=biases)
    for place in range(OUTPUTS):
        column, wanted = y[:, place].numpy(), target[:, place].double().numpy()
        free = [column] * gains + [np.ones(TOKENS)] * biases
        best = np.linalg.lstsq(np.stack(free, 1), wanted - (0 if gains else column), rcond=None)[0]
        expected = (best[0] if gains else 1.0, best[-1] if biases else 0.0)
        assert (float(gain[place]), float(bias[place])) == pytest.approx(expected, rel=1e-3)


def test_an_output_that_is_always_zero_keeps_its_gain(kept: torch.Tensor) -> None:
    weight = torch.zeros(CHANNELS + 1, OUTPUTS, dtype=torch.float64)
    moments = moments_of(kept, torch.ones(TOKENS, OUTPUTS))
    gain, bias = gain_and_bias(moments, "one", weight, gains=True, biases=True)
    assert gain.tolist() == [1.0] * OUTPUTS
    assert bias.tolist() == pytest.approx([1.0] * OUTPUTS)


def test_a_change_of_low_rank_is_found_and_a_small_one_of_full_rank_is_cut(
    kept: torch.Tensor,
) -> None:
    weight = affine()
    change = drawn(CHANNELS, 2, seed=3).double() @ drawn(2, OUTPUTS, seed=4).double()
    target = (applied(kept, weight) + kept.double() @ change).float()
    moments = moments_of(kept, target)
    inner, outer = compensation(moments, "one", weight, 2, seed=0)
    assert inner.norm(dim=0).tolist() == pytest.approx([1.0, 1.0])
    # The ridge holds it back a little where inputs hardly occur.
    missed = kept.double() @ (inner @ outer - change)
    assert float(missed.norm() / (kept.double() @ change).norm()) < 0.05
    rank_one = compensation(moments, "one", weight, 1, seed=0)
    best = float(torch.linalg.svdvals(kept.double() @ change)[1])
    left = float((kept.double() @ (rank_one[0] @ rank_one[1] - change)).norm())
    assert best <= left < 1.1 * best


def test_a_rank_beyond_the_sides_is_all_of_it(kept: torch.Tensor) -> None:
    weight = affine()
    target = (applied(kept, weight) + drawn(TOKENS, OUTPUTS, seed=5)).float()
    inner, outer = compensation(moments_of(kept, target), "one", weight, OUTPUTS, seed=0)
    assert (inner.shape, outer.shape) == ((CHANNELS, OUTPUTS), (OUTPUTS, OUTPUTS))
