"""The folded linear against the oracle, and the unfolded one against the folded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from nmexport import oracle
from nmexport.calibration.method import behaviour_of, constants_of, needs_static_variance
from nmexport.recipe import SparsitySection
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.remainder import rank_within, remainder_of
from nmexport.sparsity.statistics import ChannelStatistics

from tests.sparsity.test_mask import tensor_of
from tests.support.op_cases import TYPES
from tests.support.unfolded import UnfoldedLinear, folded_linear

K, N_OUT = 96, 24
CRITERIA = ("act", "wina", "clact", "amber")
MITIGATIONS = [
    tuple(name for name in (shift, variance) if name)
    for shift, variance in itertools.product(("", "d-pts", "s-pts"), ("", "var", "s-var"))
]


def dense(*, bias_scale: float = 1.0, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(K, N_OUT)
    with torch.no_grad():
        linear.bias.mul_(bias_scale)
    return linear


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    channel_size = torch.linspace(0.2, 3, K)
    return torch.randn(*shape, K, generator=generator) * channel_size + 0.3


def statistics_of(x: torch.Tensor) -> ChannelStatistics:
    tokens = x.reshape(-1, x.shape[-1]).double()
    return ChannelStatistics(
        tokens=tokens.shape[0],
        mean=tokens.mean(0),
        rms=tokens.square().mean(0).sqrt(),
        mean_magnitude=tokens.abs().mean(0),
    )


def derived(
    linear: torch.nn.Linear, criterion: str, mitigations: tuple[str, ...], grouping: str
) -> tuple[Behaviour, Constants]:
    section = SparsitySection.model_validate(
        {"criterion": criterion, "mitigations": mitigations, "grouping": grouping}
    )
    constants = constants_of(section, linear.weight, statistics_of(inputs(64, seed=9)))
    if needs_static_variance(section):
        constants = replace(constants, nu=1.17)
    return behaviour_of(section), constants


def oracle_of(folded: SparseLinear, x: np.ndarray[Any, Any], dtype: Any) -> oracle.Reference:
    def array(tensor: torch.Tensor | None, kind: Any) -> Any:
        return None if tensor is None else tensor.float().numpy().astype(kind)

    return oracle.reference(
        x,
        array(folded.W, dtype),
        n=folded.behaviour.pattern.n,
        m=folded.behaviour.pattern.m,
        bias=array(folded.bias, dtype),
        shift=None if folded.behaviour.dynamic_shift else array(folded.site.eta, np.float32),
        shift_weight=array(folded.shift_weight, np.float32),
        score_scale=array(folded.site.score_scale, np.float32),
        channel_order=array(folded.channel_order, np.int32),
        dynamic_shift=folded.behaviour.dynamic_shift,
        variance_correction=folded.behaviour.variance_correction,
        phase=folded.behaviour.phase,
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mitigations", MITIGATIONS, ids="+".join)
def test_folded_agrees_with_the_oracle(mitigations: tuple[str, ...], dtype: Any) -> None:
    linear = dense()
    behaviour, constants = derived(linear, "wina", mitigations, "balanced")
    x = inputs(2, 5).numpy().astype(dtype)
    given = tensor_of(x)
    folded = folded_linear(linear, behaviour, constants, dtype=given.dtype)
    expected = oracle_of(folded, x, dtype)
    if not behaviour.dynamic_shift:  # there a mean's summation order may swap near-equal scores
        np.testing.assert_array_equal(folded.keep_mask(given).numpy(), expected.keep)
    y = folded(given)
    assert y.dtype == given.dtype
    agrees = oracle.agrees(y.float().numpy(), expected.value, expected.bound(dtype))
    assert agrees.all()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("mitigations", MITIGATIONS, ids="+".join)
@pytest.mark.parametrize("grouping", ["consecutive", "balanced"])
def test_folding_changes_nothing(
    criterion: str, mitigations: tuple[str, ...], grouping: str
) -> None:
    linear = dense()
    behaviour, constants = derived(linear, criterion, mitigations, grouping)
    x = inputs(3, 7)
    unfolded = UnfoldedLinear(linear, behaviour, constants)(x)
    folded = folded_linear(linear, behaviour, constants)(x)
    torch.testing.assert_close(folded, unfolded, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(folded, linear(x), atol=1e-2)  # it did drop something


@pytest.mark.parametrize("mitigations", MITIGATIONS, ids="+".join)
def test_a_remainder_meets_every_channel(mitigations: tuple[str, ...]) -> None:
    linear = dense()
    behaviour, constants = derived(linear, "wina", mitigations, "balanced")
    x = inputs(3, 7)
    plain = UnfoldedLinear(linear, behaviour, constants)(x)
    rank = rank_within(0.5, K, N_OUT)
    constants = replace(constants, remainder=remainder_of(linear.weight, rank))
    unfolded = UnfoldedLinear(linear, behaviour, constants)(x)
    folded = folded_linear(linear, behaviour, constants)
    torch.testing.assert_close(folded(x), unfolded, rtol=1e-4, atol=1e-4)
    exact = linear(x)
    assert (unfolded - exact).norm() < (plain - exact).norm()
    whole = replace(constants, remainder=remainder_of(linear.weight, min(K, N_OUT)), nu=None)
    # Of full rank, nothing that is dropped is lost.
    complete = UnfoldedLinear(linear, Behaviour(pattern=behaviour.pattern), whole)(x)
    torch.testing.assert_close(complete, exact, rtol=1e-3, atol=1e-3)


def test_rank_keeps_the_factors_within_their_share() -> None:
    for share in (0.01, 0.05, 0.3):
        rank = rank_within(share, 576, 1536)
        assert rank * (576 + 1536) <= share * 576 * 1536 < (rank + 1) * (576 + 1536)
    assert rank_within(1e-6, 64, 64) == 1
    weight = dense().weight
    one, other = remainder_of(weight, 3, seed=1), remainder_of(weight, 3, seed=1)
    assert torch.equal(one.inner @ one.outer, other.inner @ other.outer)
    left, sizes, right = torch.linalg.svd(weight.detach().t(), full_matrices=False)
    best = left[:, :3] * sizes[:3] @ right[:3]
    torch.testing.assert_close(one.inner @ one.outer, best, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mitigations", MITIGATIONS, ids="+".join)
def test_large_biases_stay(mitigations: tuple[str, ...]) -> None:
    linear = dense(bias_scale=3000.0)  # as in Qwen2's k_proj
    behaviour, constants = derived(linear, "act", mitigations, "consecutive")
    x = inputs(4)
    folded = folded_linear(linear, behaviour, constants)(x)
    unfolded = UnfoldedLinear(linear, behaviour, constants)(x)
    torch.testing.assert_close(folded, unfolded, rtol=1e-5, atol=1e-2)
    assert (folded - linear.bias).abs().max() < 50


def test_a_linear_without_bias_gets_one_only_from_a_shift() -> None:
    linear = torch.nn.Linear(K, N_OUT, bias=False)
    for mitigations, names in (
        ((), {"W"}),
        (("s-pts",), {"W", "bias", "shift"}),
        (("d-pts",), {"W", "shift_weight"}),
    ):
        behaviour, constants = derived(linear, "act", mitigations, "consecutive")
        assert set(fold(linear, behaviour, constants, dtype=torch.float32)) == names


def test_a_shift_per_channel_folds_like_a_scalar_one() -> None:
    linear = dense()
    constants = Constants(shift=torch.linspace(-1, 1, K))
    behaviour = Behaviour(pattern=NMPattern(2, 4))
    x = inputs(5)
    torch.testing.assert_close(
        folded_linear(linear, behaviour, constants)(x),
        UnfoldedLinear(linear, behaviour, constants)(x),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("mitigations", [(), ("s-pts", "var"), ("d-pts", "var")], ids="+".join)
@pytest.mark.parametrize("pattern", ["16:16", "8:16"])
def test_what_drops_nothing_is_the_dense_linear(mitigations: tuple[str, ...], pattern: str) -> None:
    linear = dense()
    behaviour, constants = derived(linear, "act", mitigations, "consecutive")
    all_kept = pattern == "16:16"
    behaviour = replace(
        behaviour, pattern=NMPattern.parse(pattern), phase="all" if all_kept else "prefill"
    )
    x = inputs(3, 1)
    for module in (
        folded_linear(linear, behaviour, constants),
        UnfoldedLinear(linear, behaviour, constants),
    ):
        torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-5)
    # A token of zeros: its variance lies below the floor, which must not matter here.
    zeros = torch.zeros(1, 1, K)
    folded = folded_linear(linear, behaviour, constants)
    torch.testing.assert_close(folded(zeros), linear(zeros), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("phase", "length", "drops"),
    [("all", 1, True), ("all", 4, True), ("decode", 1, True), ("decode", 4, False),
     ("prefill", 1, False), ("prefill", 4, True)],
)  # fmt: skip
def test_phase_decides_by_sequence_length(phase: Any, length: int, drops: bool) -> None:
    behaviour = Behaviour(pattern=NMPattern(8, 16), phase=phase)
    folded = folded_linear(dense(), behaviour, Constants())
    assert bool(folded.keep_mask(inputs(2, length)).all()) != drops


@pytest.mark.parametrize("mitigations", [(), ("d-pts", "var"), ("s-pts", "s-var")], ids="+".join)
def test_a_token_does_not_depend_on_its_neighbours(mitigations: tuple[str, ...]) -> None:
    linear = dense()
    behaviour, constants = derived(linear, "clact", mitigations, "balanced")
    folded = folded_linear(linear, behaviour, constants)
    x = inputs(3, 4)
    loud = x.clone()
    loud[1:] *= 1000.0
    together, beside_loud = folded(x), folded(loud)
    torch.testing.assert_close(together[0], beside_loud[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1, 2], folded(x[1:2, 2:3])[0, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(folded.keep_mask(x)[0], folded.keep_mask(loud)[0])


def test_s_var_scales_the_product_and_not_the_bias() -> None:
    linear = dense(bias_scale=10.0)
    behaviour = Behaviour(pattern=NMPattern(8, 16))
    constants = Constants(shift=torch.tensor([0.5]), nu=1.5)
    plain = fold(linear, behaviour, replace(constants, nu=None), dtype=torch.float32)
    scaled = fold(linear, behaviour, constants, dtype=torch.float32)
    torch.testing.assert_close(scaled["W"], 1.5 * plain["W"])
    assert torch.equal(scaled["bias"], plain["bias"])


def test_an_op_with_two_shifts_cannot_be_made() -> None:
    behaviour = Behaviour(pattern=NMPattern(8, 16), dynamic_shift=True)
    with pytest.raises(ValueError, match="excludes a static shift"):
        SparseLinear(
            behaviour,
            {
                "W": torch.zeros(K, N_OUT),
                "shift": torch.zeros(1),
                "shift_weight": torch.zeros(N_OUT),
            },
        )
    with pytest.raises(ValueError, match="shift_weight"):
        SparseLinear(behaviour, {"W": torch.zeros(K, N_OUT)})


def test_it_says_what_it_is() -> None:
    folded = folded_linear(dense(), Behaviour(pattern=NMPattern(2, 4)), Constants())
    assert repr(folded).startswith(f"SparseLinear(\n  {K}, {N_OUT}, 2:4, phase=all\n")


@pytest.mark.parametrize("mitigations", MITIGATIONS, ids="+".join)
def test_folded_constants_lie_in_gathered_order(mitigations: tuple[str, ...]) -> None:
    """Gathering the input of the order's fold is the fold of a linear whose channels were moved."""
    linear = dense()
    behaviour, constants = derived(linear, "wina", mitigations, "balanced")
    order = constants.channel_order
    assert order is not None
    constants = replace(constants, shift=torch.linspace(-1, 1, K) if constants.shift is not None
                        else None)  # fmt: skip
    moved = torch.nn.Linear(K, N_OUT)
    moved.weight.data = linear.weight.data[:, order.long()]
    moved.bias.data = linear.bias.data

    def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[order.long()]

    alone = replace(
        constants,
        channel_order=None,
        shift=move(constants.shift),
        score_scale=move(constants.score_scale),
    )
    ordered = fold(linear, behaviour, constants, dtype=torch.float32)
    expected = fold(moved, behaviour, alone, dtype=torch.float32)
    assert torch.equal(ordered.pop("channel_order"), order)
    assert ordered.keys() == expected.keys()
    for name in ("W", "shift", "score_scale"):
        if name in ordered:
            assert torch.equal(ordered[name], expected[name])
    torch.testing.assert_close(ordered.get("bias"), expected.get("bias"))


def test_a_remainder_beside_an_order_and_a_shift_by_channel() -> None:
    """The remainder reads X in its own order, the op in gathered order."""
    linear = dense()
    constants = Constants(
        shift=torch.linspace(-1, 1, K),
        channel_order=torch.randperm(K, generator=torch.Generator().manual_seed(1)).int(),
        remainder=remainder_of(linear.weight, 4),
    )
    behaviour = Behaviour(pattern=NMPattern(2, 4))
    x = inputs(3, 5)
    unfolded = UnfoldedLinear(linear, behaviour, constants)(x)
    folded = folded_linear(linear, behaviour, constants)(x)
    torch.testing.assert_close(folded, unfolded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_whole_sequences_are_prompts_then_decoded_tokens(phase: Any) -> None:
    """`prompt` says where decoding begins: the same as a prompt, then token by token."""
    linear = dense()
    behaviour, constants = derived(linear, "act", ("d-pts", "var"), "balanced")
    behaviour = replace(behaviour, phase=phase)
    tensors = fold(linear, behaviour, constants, dtype=torch.float32)
    stepwise = SparseLinear(behaviour, tensors)
    whole = SparseLinear(behaviour, tensors, prompt=4)
    x = inputs(2, 7)
    steps = [stepwise(x[:, :4]), *(stepwise(x[:, place : place + 1]) for place in range(4, 7))]
    torch.testing.assert_close(whole(x), torch.cat(steps, dim=1))
