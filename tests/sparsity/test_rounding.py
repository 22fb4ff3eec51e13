"""Rounding weights to few bits: scales, compensation, and that both are worth it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.sparsity.quantisation import VALUE_RANGES, QuantisedWeight
from nmexport.sparsity.rounding import GRIDS, Grid, levels_of, meant, quantised, search_scales
from nmexport.sparsity.weight_form import STORED_TYPES, WeightForm

INTEGERS = STORED_TYPES[:3]


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(channels: int, *, seed: int = 0) -> torch.Tensor:
    """Tokens `[T, K]` whose channels go together, some of them strong."""
    mixed = normals(400, channels, seed=seed) @ normals(channels, channels, seed=seed + 1)
    return mixed * torch.exp(normals(channels, seed=seed + 2)) / channels**0.5


def second_moment(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.t() @ tokens / len(tokens)


def product_error(tokens: torch.Tensor, weight: torch.Tensor, stored: QuantisedWeight) -> float:
    return float((tokens @ (stored.dequantised() - weight)).square().mean())


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("compensates", [False, True])
@given(
    sizes=st.tuples(
        st.sampled_from((1, 2, 3)), st.sampled_from((2, 6)), st.sampled_from((1e-9, 1.0, 1e9))
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_what_is_stored_is_near_and_in_range(kind, compensates, sizes, seed):
    groups, outputs, size = sizes
    weight = normals(96, outputs, seed=seed) * size
    weight[5], weight[:, 0] = 0.0, 0.0
    form = WeightForm(kind, 96 // groups if groups > 1 else None)
    moment = second_moment(inputs_of(96, seed=seed)) if compensates else None
    stored = quantised(weight, form, second_moment=moment, name="layer")
    low, high = VALUE_RANGES[kind]
    assert (stored.type, stored.scale.shape) == (kind, (groups, outputs))
    assert low <= int(stored.values.min()) <= int(stored.values.max()) <= high
    assert bool(stored.scale.isfinite().all())
    if not compensates:
        # No weight is off by more than what the least share cuts off, or half a level.
        bound = 0.51 * stored.scale.abs() + (1 - min(GRIDS[kind].shares)) * 4.5 * size
        error = (stored.dequantised() - weight).abs().reshape(groups, -1, outputs)
        assert bool((error <= bound.unsqueeze(1)).all())


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_weight_on_the_grid_is_kept(kind):
    low, high = VALUE_RANGES[kind]
    values = torch.randint(max(low, -127), high + 1, (64, 8), generator=torch.manual_seed(1))
    values[0], values[1] = high, max(low, -127)
    point = 3.0 if kind == "uint4" else 0.0
    stored = quantised((values - point) * 0.125, WeightForm(kind, None), name="layer")
    torch.testing.assert_close(stored.dequantised(), (values - point) * 0.125)


def test_scales_are_chosen_by_the_error_of_channels_that_count():
    """An outlier on a channel that hardly speaks is cut off; on one that does, it is kept."""
    weight = normals(32, 4, seed=3) * 0.1
    weight[7] = 1.0
    quiet = torch.ones(32)
    quiet[7] = 1e-4
    loud = torch.ones(32)
    grid = GRIDS["int4"]
    errors = {}
    for name, importance in (("quiet", quiet), ("loud", loud)):
        scales = search_scales(weight, 1, grid, importance)
        levels = levels_of(weight, scales, grid)
        errors[name] = (meant(levels, scales) - weight)[7].abs().max()
    assert errors["loud"] < 0.1 < errors["quiet"]


def test_more_shares_are_never_worse():
    weight, importance = normals(64, 16, seed=5), torch.exp(normals(64, seed=6))
    found = []
    for shares in ((1.0,), (1.0, 0.9), (1.0, 0.9, 0.8, 0.7)):
        grid = Grid("int4", shares)
        scales = search_scales(weight, 1, grid, importance)
        error = (meant(levels_of(weight, scales, grid), scales) - weight).square()
        found.append(float((error * importance.unsqueeze(1)).sum()))
    assert found[0] >= found[1] >= found[2]


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("group", [None, 16, 48])
def test_compensation_lowers_the_error_of_the_product(kind, group):
    tokens, weight = inputs_of(96), normals(96, 24, seed=9)
    form = WeightForm(kind, group)
    moment = second_moment(tokens)
    plain = quantised(weight, form, importance=moment.diagonal(), name="layer")
    better = quantised(weight, form, second_moment=moment, name="layer")
    ratio = product_error(tokens, weight, better) / product_error(tokens, weight, plain)
    assert ratio < 0.7


def test_moments_of_kept_values_serve_the_kept_values_best():
    """What half of the channels carry is repaired for them alone."""
    tokens, weight = inputs_of(96, seed=20), normals(96, 24, seed=21)
    kept = tokens * (torch.rand(tokens.shape, generator=torch.manual_seed(2)) < 0.5)
    form = WeightForm("int4", 32)
    by = {
        name: quantised(weight, form, second_moment=second_moment(seen), name="layer")
        for name, seen in (("kept", kept), ("whole", tokens))
    }
    assert product_error(kept, weight, by["kept"]) < product_error(kept, weight, by["whole"])
    assert product_error(tokens, weight, by["whole"]) < product_error(tokens, weight, by["kept"])


def test_blocks_of_channels_change_no_result(monkeypatch):
    from nmexport.sparsity import rounding

    weight, moment = normals(96, 8, seed=4), second_moment(inputs_of(96, seed=4))
    found = []
    for block in (96, 32, 20):
        monkeypatch.setattr(rounding, "_BLOCK", block)
        found.append(quantised(weight, WeightForm("int4", 48), second_moment=moment, name="x"))
    for other in found[1:]:
        torch.testing.assert_close(found[0].dequantised(), other.dequantised(), atol=0.2, rtol=0)
        assert float((found[0].values == other.values).float().mean()) > 0.99


def test_channels_that_nothing_meets_harm_no_others():
    tokens, weight = inputs_of(64, seed=7), normals(64, 6, seed=8)
    tokens[:, 10:20] = 0.0
    stored = quantised(
        weight, WeightForm("int4", 32), second_moment=second_moment(tokens), name="x"
    )
    assert bool(stored.scale.isfinite().all())
    plain = quantised(weight, WeightForm("int4", 32), name="x")
    assert product_error(tokens, weight, stored) < product_error(tokens, weight, plain)


def test_it_is_the_same_every_time():
    weight, moment = normals(64, 6), second_moment(inputs_of(64))
    one, two = (
        quantised(weight, WeightForm("int4", 16), second_moment=moment, name="x") for _ in "ab"
    )
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.scale, two.scale)


def test_an_odd_number_of_outputs_is_stored_in_bytes():
    """Four bits lie two a byte along the outputs."""
    assert quantised(normals(32, 5), WeightForm("int4", 16), name="x").type == "int8"
