"""Learned constants of one linear: the selection, the gradient, and what folding makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.sparsity.fold import Corrections, fold
from nmexport.sparsity.lanes import LaneSelector
from nmexport.sparsity.learned import LearnedLinear, LearningSite, Spread
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.mask import keep_mask
from nmexport.sparsity.parts import PARTS
from nmexport.sparsity.pattern import NMPattern
from torch import nn

from tests.support.unfolded import folded_linear

K, O, T = 64, 24, 37  # noqa: E741 - the op contract's names
PATTERN = NMPattern(8, 16)
SPREAD = Spread(input_rms=torch.full((K,), 0.7), output_rms=torch.full((O,), 1.3))
BEHAVIOURS = {
    "plain": Behaviour(pattern=PATTERN),
    "asymmetric": Behaviour(pattern=NMPattern(3, 8)),
    "variance": Behaviour(pattern=PATTERN, variance_correction=True),
    "dynamic": Behaviour(pattern=PATTERN, dynamic_shift=True),
    "both": Behaviour(pattern=PATTERN, dynamic_shift=True, variance_correction=True),
}


def dense_linear(*, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, O, bias=bias).requires_grad_(requires_grad=False)


def calibrated(behaviour: Behaviour, *, nu: float | None = None) -> Constants:
    generator = torch.Generator().manual_seed(1)
    return Constants(
        score_scale=torch.rand(K, generator=generator) + 0.5,
        channel_order=torch.randperm(K, generator=generator).int(),
        shift=None if behaviour.dynamic_shift else torch.tensor([0.11]),
        nu=None if behaviour.variance_correction else nu,
    )


def parts_of(behaviour: Behaviour) -> tuple[str, ...]:
    return tuple(part for part in PARTS if part != "shift" or not behaviour.dynamic_shift)


def disturbed(module: LearnedLinear) -> LearnedLinear:
    """Parameters away from where they start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise
    return module


def inputs() -> torch.Tensor:
    return torch.randn(T, K, generator=torch.Generator().manual_seed(3))


@given(
    pattern=st.sampled_from(["8:16", "2:4", "1:4", "3:8", "12:16", "16:32", "16:16"]),
    seed=st.integers(0, 1000),
    coarse=st.sampled_from([0, 2, 8]),
    ordered=st.booleans(),
    nan=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_lanes_select_exactly_what_the_contract_says(
    pattern: str, seed: int, coarse: int, ordered: bool, nan: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(9, K, generator=generator).abs()
    if coarse:  # many ties
        scores = (scores * coarse).round()
    if nan:
        scores[3, 5] = float("nan")
    order = torch.randperm(K, generator=generator).int() if ordered else None
    chosen = NMPattern.parse(pattern)
    expected = keep_mask(scores, chosen, order)
    select = LaneSelector(chosen, K, order)
    assert torch.equal(select(scores), expected)
    assert torch.equal(select.by_rank(scores), expected)


@pytest.mark.parametrize("name", BEHAVIOURS)
@pytest.mark.parametrize("bias", [True, False])
def test_folded_equals_learned(name: str, bias: bool) -> None:
    behaviour, linear = BEHAVIOURS[name], dense_linear(bias=bias)
    constants = calibrated(behaviour, nu=1.2)
    module = disturbed(
        LearnedLinear(linear, behaviour, constants, spread=SPREAD, parts=parts_of(behaviour))
    )
    tensors = fold(linear, behaviour, constants, module.corrections(), dtype=torch.float32)
    folded = SparseLinear(behaviour, tensors)
    x = inputs().reshape(1, T, K)
    torch.testing.assert_close(folded(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_nothing_learned_folds_as_before(name: str) -> None:
    behaviour, linear = BEHAVIOURS[name], dense_linear()
    constants = calibrated(behaviour, nu=1.2)
    before = fold(linear, behaviour, constants, dtype=torch.float32)
    after = fold(linear, behaviour, constants, Corrections(), dtype=torch.float32)
    assert before.keys() == after.keys()
    for kind, tensor in before.items():
        torch.testing.assert_close(after[kind], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_learning_starts_where_calibration_ended(name: str) -> None:
    behaviour, linear = BEHAVIOURS[name], dense_linear()
    constants = calibrated(behaviour, nu=1.2)
    module = LearnedLinear(linear, behaviour, constants, spread=SPREAD, parts=parts_of(behaviour))
    calibrated_only = folded_linear(linear, behaviour, constants)
    x = inputs()
    torch.testing.assert_close(module(x), calibrated_only(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_gradient_is_that_of_the_formula_with_the_selection_held(name: str) -> None:
    """The hand-written backward pass against autograd over the formula."""
    behaviour, linear = BEHAVIOURS[name], dense_linear()
    module = disturbed(
        LearnedLinear(
            linear, behaviour, calibrated(behaviour), spread=SPREAD, parts=parts_of(behaviour)
        )
    )
    x = inputs().requires_grad_()
    weights = torch.randn(T, O, generator=torch.Generator().manual_seed(4))
    (module(x) * weights).sum().backward()
    found = {part: parameter.grad for part, parameter in module.named_parameters()}
    found["x"], x.grad = x.grad, None
    module.zero_grad()

    expected = by_formula(module, behaviour, x, linear)
    (expected * weights).sum().backward()
    wanted = {part: parameter.grad for part, parameter in module.named_parameters()}
    wanted["x"] = x.grad
    assert (wanted["site.shift"] is None) == behaviour.dynamic_shift
    for part, gradient in wanted.items():
        if gradient is None:
            assert found[part] is None
            continue
        torch.testing.assert_close(found[part], gradient, rtol=2e-5, atol=2e-5, msg=part)


def by_formula(
    module: LearnedLinear, behaviour: Behaviour, x: torch.Tensor, linear: nn.Linear
) -> torch.Tensor:
    value = module.learned
    constants = calibrated(behaviour)
    shift = module.site.shift * SPREAD.input_rms
    eta = x.mean(-1, keepdim=True) if behaviour.dynamic_shift else shift
    z = x - eta
    keep = keep_mask(
        z.detach().abs() * constants.score_scale, behaviour.pattern, constants.channel_order
    )
    kept = z * keep
    nu = torch.ones(1)
    if behaviour.variance_correction:
        nu = (z.var(-1, correction=0) / kept.var(-1, correction=0)).sqrt()[:, None].detach()
    operand = value["input_scale"] * nu * kept + eta
    compensation = (nu * kept) @ value["low_rank_in"] @ value["low_rank_out"]
    bias = linear.bias + value["bias"] * SPREAD.output_rms
    return value["output_scale"] * (operand @ linear.weight.t()) + compensation + bias


def test_linears_of_one_input_select_once_and_share_their_shift() -> None:
    behaviour = BEHAVIOURS["plain"]
    site = LearningSite(
        behaviour, calibrated(behaviour), input_rms=SPREAD.input_rms, members=2, learns_shift=True
    )
    alone, first, second = (
        disturbed(
            LearnedLinear(
                dense_linear(seed=seed), behaviour, calibrated(behaviour), spread=SPREAD, site=at
            )
        )
        for seed, at in ((1, None), (1, site), (2, site))
    )
    site.shift.data.copy_(alone.site.shift.data)
    x = inputs()
    assert site.select(x) is site.select(x)
    torch.testing.assert_close(first(x), alone(x))
    (first(x).sum() + second(x).sum()).backward()
    assert torch.equal(first.corrections().shift, second.corrections().shift)
    # A member that was not called leaves nothing behind that a later input could be handed.
    other = x + 1
    torch.testing.assert_close(first(other), alone(other))
    torch.testing.assert_close(first(x.clone()), alone(x))


def test_dense_mode_is_the_dense_linear() -> None:
    linear = dense_linear()
    module = disturbed(LearnedLinear(linear, BEHAVIOURS["plain"], Constants(), spread=SPREAD))
    module.sparse = False
    x = inputs()
    torch.testing.assert_close(module(x), linear(x))


def test_half_products_stay_near() -> None:
    linear = dense_linear()
    behaviour = BEHAVIOURS["plain"]
    exact, half = (
        LearnedLinear(linear, behaviour, calibrated(behaviour), spread=SPREAD, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    x = inputs()
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), exact(x), rtol=0.05, atol=0.02)


def test_shift_and_its_own_kind_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude"):
        LearnedLinear(dense_linear(), BEHAVIOURS["dynamic"], Constants(), spread=SPREAD)


@pytest.mark.parametrize(
    "changing",
    [
        {"output_scale": torch.ones(O)},
        {"low_rank_in": torch.ones(K, 1), "low_rank_out": torch.ones(1, O)},
    ],
)
def test_what_changes_the_weight_is_refused_where_a_phase_stays_dense(
    changing: dict[str, torch.Tensor],
) -> None:
    behaviour = Behaviour(pattern=PATTERN, phase="decode")
    corrections = Corrections(**changing)
    with pytest.raises(ValueError, match="stays dense needs the weight as it is"):
        fold(dense_linear(), behaviour, Constants(), corrections, dtype=torch.float32)


def test_every_token_is_learned_from_as_one_that_the_phase_includes() -> None:
    behaviour, linear = Behaviour(pattern=PATTERN), dense_linear()
    decoding = replace(behaviour, phase="decode")
    always = disturbed(LearnedLinear(linear, behaviour, calibrated(behaviour), spread=SPREAD))
    decoded = LearnedLinear(linear, decoding, calibrated(decoding), spread=SPREAD)
    # With a dense phase the site owns the scale, so the parameter has another path.
    learned = {name.rsplit(".")[-1]: value for name, value in always.named_parameters()}
    for name, parameter in decoded.named_parameters():
        parameter.data.copy_(learned[name.rsplit(".")[-1]])
    x = inputs().reshape(1, T, K)
    assert torch.equal(always(x), decoded(x))


def test_dead_channels_do_not_divide_by_zero() -> None:
    dead = Spread(input_rms=torch.zeros(K), output_rms=torch.zeros(O))
    behaviour = BEHAVIOURS["plain"]
    module = LearnedLinear(dense_linear(), behaviour, calibrated(behaviour), spread=dead)
    found = [one for one in vars(module.corrections()).values() if one is not None]
    assert found
    assert all(bool(one.isfinite().all()) for one in found)
