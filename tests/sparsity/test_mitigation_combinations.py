"""Every combination of mitigations: the legal ones fold exactly, the others say why not."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from nmexport.calibration.method import behaviour_of, constants_of, needs_static_variance
from nmexport.errors import RecipeError
from nmexport.recipe import SparsitySection
from nmexport.sparsity.fold import fold
from nmexport.sparsity.learned import LearnedLinear, Spread
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear, token_product
from nmexport.sparsity.mitigation import MITIGATIONS, check_combination, learned_parts
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.remainder import remainder_of
from nmexport.sparsity.statistics import ChannelStatistics
from torch import nn

from tests.support.unfolded import UnfoldedLinear

K, O, RANK = 64, 24, 4  # noqa: E741 - the op contract's names
SHIFTS = {"d-pts", "s-pts", "l-pts"}
VARIANCES = {"var", "s-var"}
LEARNED = {"l-pts", "ls", "gain", "bias", "low-rank"}
LEAVE_W = {*SHIFTS, *VARIANCES, "ls", "bias"}
"""The folded weight is the dense one, so that a phase may stay dense."""
PHASES = ("all", "prefill", "decode")

Names = tuple[str, ...]


def wrong(names: Names, phases: str) -> str | None:
    """What is wrong with a combination, told apart from how the package tells it."""
    given = set(names)
    if len(given & SHIFTS) > 1:
        return "one shift before selection"
    if len(given & VARIANCES) > 1:
        return "one variance correction"
    if "r-sparse" in given and given & LEARNED:
        return "r-sparse and .* cannot be combined"
    if phases != "all" and given - LEAVE_W:
        return "which stays dense"
    return None


SUBSETS: list[Names] = [
    subset
    for count in range(len(MITIGATIONS) + 1)
    for subset in itertools.combinations(MITIGATIONS, count)
]
LEGAL = {phases: [names for names in SUBSETS if wrong(names, phases) is None] for phases in PHASES}


def test_so_many_combinations_are_legal() -> None:
    # Four shifts or none, three variances, any of four more that are learned; or the remainder,
    # with what is not learned. Where a phase stays dense, two of the four.
    assert len(LEGAL["all"]) == 4 * 3 * 16 + 3 * 3
    assert len(LEGAL["prefill"]) == len(LEGAL["decode"]) == 4 * 3 * 4


@pytest.mark.parametrize("phases", PHASES)
def test_the_others_are_refused_with_the_reason(phases: str) -> None:
    for names in SUBSETS:
        reason = wrong(names, phases)
        if reason is None:
            check_combination(names, phases)
            continue
        with pytest.raises(RecipeError) as caught:
            check_combination(names, phases)
        assert re.search(reason, caught.value.problem), names
        assert caught.value.allowed or caught.value.fix, names


def dense_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, O).requires_grad_(requires_grad=False)


def inputs(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, length, K, generator=generator) * torch.linspace(0.2, 2, K) + 0.3


def calibrated(section: SparsitySection, linear: nn.Linear) -> tuple[Behaviour, Constants]:
    tokens = inputs(50).reshape(-1, K).double()
    statistics = ChannelStatistics(
        tokens=len(tokens),
        mean=tokens.mean(0),
        rms=tokens.square().mean(0).sqrt(),
        mean_magnitude=tokens.abs().mean(0),
    )
    constants = constants_of(section, linear.weight, statistics)
    if needs_static_variance(section):
        constants = replace(constants, nu=1.17)
    if "r-sparse" in section.mitigations:
        constants = replace(constants, remainder=remainder_of(linear.weight, RANK))
    return behaviour_of(section), constants


def modules(names: Names, phases: str) -> tuple[nn.Module, SparseLinear]:
    """The method unfolded, which drops in every phase, and folded."""
    section = SparsitySection.model_validate(
        {"criterion": "wina", "grouping": "balanced", "mitigations": names, "phases": phases}
    )
    linear = dense_linear()
    behaviour, constants = calibrated(section, linear)
    parts = learned_parts(names)
    if not parts:
        tensors = fold(linear, behaviour, constants, dtype=torch.float32)
        unfolded = UnfoldedLinear(linear, replace(behaviour, phase="all"), constants)
        return unfolded, SparseLinear(behaviour, tensors)
    spread = Spread(input_rms=torch.full((K,), 0.7), output_rms=torch.full((O,), 1.3))
    learned = LearnedLinear(linear, behaviour, constants, spread=spread, parts=parts, rank=RANK)
    generator = torch.Generator().manual_seed(2)
    for parameter in learned.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tensors = fold(linear, behaviour, constants, learned.corrections(), dtype=torch.float32)
    return learned, SparseLinear(behaviour, tensors)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", LEGAL["all"], ids=lambda names: "+".join(names) or "none")
def test_folded_is_the_method_unfolded(names: Names) -> None:
    unfolded, folded = modules(names, "all")
    with torch.no_grad():
        for length in (1, 9):
            close(folded(inputs(length)), unfolded(inputs(length)))
        assert not torch.allclose(folded(inputs(9)), dense_linear()(inputs(9)), atol=1e-2)


@pytest.mark.parametrize("names", LEGAL["decode"], ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize(("phases", "sparse", "dense"), [("decode", 1, 9), ("prefill", 9, 1)])
def test_the_other_phase_is_the_dense_linear(
    names: Names, phases: str, sparse: int, dense: int
) -> None:
    unfolded, folded = modules(names, phases)
    with torch.no_grad():
        close(folded(inputs(sparse)), unfolded(inputs(sparse)))
        close(folded(inputs(dense)), dense_linear()(inputs(dense)))
    order = folded.channel_order
    assert order is not None
    assert torch.equal(folded.W, dense_linear().weight.t()[order.long()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [2, 33])
def test_a_dense_prompt_of_a_learned_linear_is_the_dense_linear_bit_for_bit(
    bias: bool, tokens: int
) -> None:
    linear = dense_linear() if bias else nn.Linear(K, O, bias=False).requires_grad_(False)
    behaviour = Behaviour(pattern=NMPattern(8, 16), phase="decode")
    spread = Spread(input_rms=torch.full((K,), 0.7), output_rms=torch.full((O,), 1.3))
    learned = LearnedLinear(
        linear, behaviour, Constants(), spread=spread, parts=("shift", "input_scale", "bias")
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in learned.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tensors = fold(linear, behaviour, Constants(), learned.corrections(), dtype=torch.float32)
    assert tensors.keys() == {"W", "bias", "shift", "value_scale"} | (
        {"dense_bias"} if bias else set()
    )
    folded = SparseLinear(behaviour, tensors)
    with torch.no_grad():
        prompt, token = inputs(tokens), inputs(1)
        dense = token_product(prompt, linear.weight.t().contiguous())
        assert torch.equal(folded(prompt), dense if linear.bias is None else dense + linear.bias)
        close(folded(token), learned(token))
        assert not torch.allclose(folded(token), linear(token), atol=1e-2)
