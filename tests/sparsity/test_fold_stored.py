"""Constants folded around stored weights: the same linear as folded into floats, bits untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.sparsity.fold import Corrections, fold
from nmexport.sparsity.fold_stored import fold_stored, order_within_groups
from nmexport.sparsity.linear import Behaviour, Constants, Remainder, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.quantisation import VALUE_RANGES, QuantisedWeight
from torch import nn

CHANNELS, OUTPUTS = 96, 10
PATTERN = NMPattern(8, 16)


def stored_weight(
    kind: str = "uint4", groups: int = 3, *, seed: int = 0, ordered: bool = True
) -> QuantisedWeight:
    generator = torch.Generator().manual_seed(seed)
    low, high = VALUE_RANGES[kind]

    def values(*shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)

    order = torch.randperm(CHANNELS, generator=generator).int() if ordered else None
    return QuantisedWeight(
        values=values(CHANNELS, OUTPUTS),
        scale=torch.rand(groups, OUTPUTS, generator=generator).half() * 0.1,
        type=kind,  # type: ignore[arg-type]
        zero_point=values(groups, OUTPUTS),
        channel_order=order,
    )


def as_linear(weight: QuantisedWeight, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(CHANNELS, OUTPUTS, bias=bias is not None)
    linear.weight.data = weight.dequantised().t().contiguous()
    if bias is not None:
        linear.bias.data = bias
    return linear


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_it_computes_what_the_folded_floats_compute(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 99))
    flags = {
        name: data.draw(st.booleans(), label=name)
        for name in (
            "ordered",
            "wishes",
            "shift",
            "input",
            "output",
            "bias",
            "own",
            "score",
            "nu",
            "learned",
        )
    }
    groups = data.draw(st.sampled_from((1, 2, 3, 6)))
    kind = data.draw(st.sampled_from(("int8", "int4", "uint4")))
    dynamic = data.draw(st.booleans())
    weight = stored_weight(kind, groups, seed=seed, ordered=flags["ordered"])
    generator = torch.Generator().manual_seed(seed + 1)

    def numbers(size: int, wanted: bool) -> torch.Tensor | None:
        made = 1 + 0.3 * torch.randn(size, generator=generator)
        return made if wanted else None

    wished = torch.randperm(CHANNELS, generator=generator).int() if flags["wishes"] else None
    behaviour = Behaviour(pattern=PATTERN, dynamic_shift=dynamic, variance_correction=True)
    constants = Constants(
        score_scale=numbers(CHANNELS, flags["score"]),
        channel_order=order_within_groups(wished, weight),
        shift=numbers(CHANNELS, flags["shift"] and not dynamic),
        nu=1.25 if flags["nu"] else None,
    )
    corrections = Corrections(
        shift=numbers(CHANNELS, flags["learned"] and not dynamic),
        input_scale=numbers(CHANNELS, flags["input"]),
        output_scale=numbers(OUTPUTS, flags["output"]),
        bias=numbers(OUTPUTS, flags["bias"]),
    )
    own = numbers(OUTPUTS, flags["own"])
    made = fold_stored(weight, own, behaviour, constants, corrections, dtype=torch.float32)
    expected = fold(as_linear(weight, own), behaviour, constants, corrections, dtype=torch.float32)
    x = torch.randn(5, CHANNELS, generator=generator)
    one, two = (SparseLinear(behaviour, tensors) for tensors in (made, expected))
    assert torch.equal(one.keep_mask(x), two.keep_mask(x))
    with torch.no_grad():
        torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-4)
    # The stored integers, row by row of the input's own channels.
    order = constants.channel_order
    rows = torch.arange(CHANNELS) if order is None else order.long()
    given = weight.values
    if weight.channel_order is not None:
        given = given[torch.argsort(weight.channel_order.long())]
    assert torch.equal(made["W"], given[rows])
    assert ("value_scale" in made) == flags["input"]


def test_without_anything_to_fold_all_stored_bits_are_as_they_were() -> None:
    weight = stored_weight()
    made = fold_stored(weight, None, Behaviour(pattern=PATTERN), Constants(), dtype=torch.float16)
    assert made.keys() == {"W", "weight_scale", "weight_zero_point", "channel_order"}
    assert torch.equal(made["W"], weight.values)
    assert torch.equal(made["weight_scale"], weight.scale)
    assert made["weight_scale"].dtype == torch.float16
    assert torch.equal(made["channel_order"], weight.channel_order)


def test_an_order_keeps_scale_groups_whole_and_follows_the_wish_inside() -> None:
    weight = stored_weight(groups=3)
    wished = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(5)).int()
    order = order_within_groups(wished, weight)
    assert order is not None
    assert sorted(order.tolist()) == list(range(CHANNELS))
    place = torch.argsort(wished.long())
    for group in order.reshape(3, 32):
        assert (place[group.long()].diff() > 0).all()
    assert order_within_groups(None, weight) is weight.channel_order
    whole = stored_weight(groups=1)
    assert order_within_groups(wished, whole) is wished


def test_an_order_that_tears_groups_apart_is_refused() -> None:
    weight = stored_weight(groups=3, ordered=False)
    constants = Constants(channel_order=torch.arange(CHANNELS, dtype=torch.int32).roll(1))
    with pytest.raises(ValueError, match="tears groups"):
        fold_stored(weight, None, Behaviour(pattern=PATTERN), constants, dtype=torch.float32)


@pytest.mark.parametrize(
    ("constants", "corrections"),
    [
        (Constants(remainder=Remainder(torch.ones(96, 2), torch.ones(2, 10))), Corrections()),
        (Constants(), Corrections(low_rank_in=torch.ones(96, 2), low_rank_out=torch.ones(2, 10))),
    ],
)
def test_what_would_change_the_weight_is_refused(
    constants: Constants, corrections: Corrections
) -> None:
    behaviour = Behaviour(pattern=PATTERN)
    with pytest.raises(ValueError, match="no compensation and no remainder"):
        fold_stored(stored_weight(), None, behaviour, constants, corrections, dtype=torch.float32)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("own", [True, False])
def test_tokens_outside_the_phase_meet_the_stored_weight_alone(groups: int, own: bool) -> None:
    behaviour = Behaviour(pattern=PATTERN, phase="decode")
    weight, bias = stored_weight(groups=groups), torch.randn(OUTPUTS) if own else None
    constants = Constants(channel_order=weight.channel_order, nu=1.25)
    corrections = Corrections(
        shift=torch.linspace(-0.3, 0.3, CHANNELS),
        input_scale=torch.linspace(0.5, 1.5, CHANNELS),
        bias=torch.ones(OUTPUTS),
    )
    made = fold_stored(weight, bias, behaviour, constants, corrections, dtype=torch.float32)
    assert torch.equal(made["W"], weight.values)
    assert torch.equal(made["weight_scale"], weight.scale)
    x = torch.randn(2, 5, CHANNELS)
    linear = as_linear(weight, bias)
    as_all = replace(behaviour, phase="all")
    expected = fold(linear, as_all, constants, corrections, dtype=torch.float32)
    with torch.no_grad():
        folded = SparseLinear(behaviour, made)
        torch.testing.assert_close(folded(x), linear(x), rtol=1e-4, atol=1e-4)
        sparse = SparseLinear(as_all, expected)(x[:, :1])
        torch.testing.assert_close(folded(x[:, :1]), sparse, rtol=1e-4, atol=1e-4)


def test_a_static_variance_leaves_stored_scales_alone_where_a_phase_stays_dense() -> None:
    behaviour = Behaviour(pattern=PATTERN, phase="decode")
    weight = stored_weight()
    made = fold_stored(
        weight, None, behaviour, Constants(channel_order=weight.channel_order, nu=1.25),
        dtype=torch.float32,
    )  # fmt: skip
    assert torch.equal(made["weight_scale"], weight.scale)
    assert torch.equal(made["value_scale"], torch.full((CHANNELS,), 1.25))


def test_a_phase_that_stays_dense_needs_its_weight_unchanged() -> None:
    behaviour = Behaviour(pattern=PATTERN, phase="decode")
    corrections = Corrections(output_scale=torch.ones(OUTPUTS))
    with pytest.raises(ValueError, match="stays dense needs the weight as it is"):
        fold_stored(stored_weight(), None, behaviour, Constants(), corrections, dtype=torch.float32)
