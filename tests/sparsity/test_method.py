"""Criteria, mitigations and groupings: the formulas, and what is refused."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from nmexport import recipe
from nmexport.calibration.method import behaviour_of, constants_of
from nmexport.errors import PatternError, RecipeError
from nmexport.sparsity.criterion import CRITERIA, score_scale
from nmexport.sparsity.grouping import GROUPINGS, channel_order
from nmexport.sparsity.mitigation import MITIGATIONS, check_combination, learned_parts
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.statistics import ChannelStatistics

PATTERN = NMPattern(8, 16)


def statistics(channels: int) -> ChannelStatistics:
    ramp = torch.linspace(0.5, 2, channels, dtype=torch.float64)
    return ChannelStatistics(tokens=10, mean=ramp - 1, rms=ramp, mean_magnitude=ramp / 2)


def test_registries_are_the_recipes_names() -> None:
    assert set(CRITERIA) == set(get_args(recipe.Criterion))
    assert set(MITIGATIONS) == set(get_args(recipe.Mitigation))
    assert set(GROUPINGS) == set(get_args(recipe.Grouping))


def test_criteria_are_the_contracts_formulas() -> None:
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 500.0  # an outlier, which Amber keeps out of its mean and deviation
    w = weight.double().numpy()
    low, high = np.quantile(w, [0.005, 0.995])
    inside = w[(w >= low) & (w <= high)]
    norms = np.linalg.norm((w - inside.mean()) / inside.std(), axis=0)
    expected = {
        "wina": np.linalg.norm(w, axis=0),
        "clact": statistics(32).rms.numpy(),
        "amber": norms / norms.min(),
    }
    assert score_scale("act", weight) is None
    for name, values in expected.items():
        scale = score_scale(name, weight, statistics(32))
        assert scale is not None
        assert scale.dtype == torch.float32
        np.testing.assert_allclose(scale.numpy(), values, rtol=1e-5)


def test_a_criterion_that_needs_statistics_says_so() -> None:
    with pytest.raises(ValueError, match="clact needs calibrated"):
        score_scale("clact", torch.ones(4, 16))


@pytest.mark.parametrize(
    "mitigations", [(), ("d-pts",), ("s-pts", "var"), ("var", "d-pts"), ("s-var", "d-pts")]
)
def test_a_shift_goes_with_a_variance_correction(mitigations: tuple[str, ...]) -> None:
    check_combination(mitigations, "all")


@pytest.mark.parametrize(
    ("mitigations", "phases", "said"),
    [
        (("d-pts", "s-pts"), "all", "one shift"),
        (("var", "s-var"), "all", "one variance correction"),
        (("var", "var"), "all", "named twice"),
        (("l-pts", "d-pts"), "all", "one shift"),
        (("r-sparse", "low-rank"), "all", "r-sparse and low-rank cannot be combined"),
        (("gain",), "decode", "prefill, which stays dense"),
        (("l-pts", "low-rank"), "prefill", "decode, which stays dense"),
        (("var", "r-sparse"), "decode", "prefill, which stays dense"),
        (("pts",), "all", "Unknown mitigation 'pts'"),
    ],
)
def test_other_combinations_are_refused_with_the_reason(
    mitigations: tuple[str, ...], phases: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        check_combination(mitigations, phases)
    assert caught.value.allowed or caught.value.fix


def test_learned_parts_follow_the_names_and_leave_a_dense_phase_alone() -> None:
    assert learned_parts(("bias", "ls", "var")) == ("input_scale", "bias")
    assert learned_parts(("s-pts", "s-var", "r-sparse")) == ()
    check_combination(("l-pts", "ls", "bias", "var"), "decode")  # W stays as it is


def test_a_phase_that_stays_dense_changes_the_default() -> None:
    assert recipe.SparsitySection(phases="decode").mitigations == ("l-pts", "ls", "bias")
    assert learned_parts(recipe.SparsitySection().mitigations)
    chosen = recipe.SparsitySection(phases="decode", mitigations=("l-pts",))
    assert chosen.mitigations == ("l-pts",)


def test_behaviour_and_constants_follow_the_section() -> None:
    section = recipe.SparsitySection(
        criterion="clact", mitigations=("s-pts", "var"), grouping="balanced"
    )
    behaviour = behaviour_of(section)
    assert (behaviour.dynamic_shift, behaviour.variance_correction) == (False, True)
    known = statistics(32)
    constants = constants_of(section, torch.ones(4, 32), known, seed=3)
    assert constants.shift is not None
    torch.testing.assert_close(constants.shift, known.mean.mean().float().reshape(1))
    assert constants.channel_order is not None
    # Balanced by mean score, so with the criterion's scale in it.
    expected = channel_order("balanced", known.mean_magnitude * known.rms, PATTERN, seed=3)
    assert expected is not None
    assert torch.equal(constants.channel_order, expected)


def test_balanced_gives_each_group_one_channel_of_each_stratum() -> None:
    strength = torch.rand(96, generator=torch.Generator().manual_seed(5))
    order = channel_order("balanced", strength, PATTERN, seed=1)
    assert order is not None
    assert order.dtype == torch.int32
    assert sorted(order.tolist()) == list(range(96))
    rank = torch.empty(96, dtype=torch.long)
    rank[torch.argsort(strength, descending=True)] = torch.arange(96)
    strata = rank[order.long()].view(6, 16) // 6
    assert (strata.sort(dim=1).values == torch.arange(16)).all()


def test_balanced_is_the_same_every_time_and_breaks_ties_by_channel() -> None:
    dead = torch.zeros(64)
    first = channel_order("balanced", dead, PATTERN, seed=0)
    again = channel_order("balanced", dead, PATTERN, seed=0)
    other = channel_order("balanced", dead, PATTERN, seed=1)
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_consecutive_needs_no_order() -> None:
    assert channel_order("consecutive", torch.ones(32), PATTERN) is None


@pytest.mark.parametrize("text", ["8:0", "17:16", "8-16", "8:65", "", "a:b", "8:16:4", "-1:4"])
def test_patterns_that_no_executor_could_run(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        NMPattern.parse(text)
    assert "8:16" in (caught.value.allowed or "")


@pytest.mark.parametrize("text", ["8:16", "1:1", "64:64", " 3:8 "])
def test_patterns_read_back(text: str) -> None:
    pattern = NMPattern.parse(text)
    assert str(pattern) == text.strip()
    assert pattern.density + pattern.sparsity == 1.0
