"""Selection must be the oracle's, bit for bit: ties, NaN, -0, infinities, denormals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport import oracle
from nmexport.sparsity.mask import keep_mask, scores_of
from nmexport.sparsity.pattern import NMPattern

from tests.support.op_cases import PATTERNS, TYPES, activations, permutations

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensor_of(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor of the same bits; torch does not read NumPy's bfloat16."""
    words = torch.from_numpy(array.view(f"i{array.dtype.itemsize}").copy())
    return words.view(_TORCH[array.dtype.name])


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_mask_is_the_oracles(data: st.DataObject) -> None:
    n, m = data.draw(st.sampled_from(PATTERNS))
    channels = m * data.draw(st.integers(1, 3))
    x = data.draw(activations((2, channels), data.draw(st.sampled_from(TYPES))))
    order = data.draw(st.none() | permutations(channels))
    scale = data.draw(
        st.none()
        | st.lists(st.floats(0, 4, width=32), min_size=channels, max_size=channels).map(
            lambda values: np.array(values, dtype=np.float32)
        )
    )
    gathered = scale if scale is None or order is None else scale[order]
    expected = oracle.keep_mask(x, n, m, score_scale=gathered, channel_order=order)
    keep = keep_mask(
        scores_of(tensor_of(x), None if scale is None else torch.from_numpy(scale)),
        NMPattern(n, m),
        None if order is None else torch.from_numpy(order),
    )
    np.testing.assert_array_equal(keep.numpy(), expected)


@pytest.mark.parametrize("m", range(1, 65))
def test_every_group_size_keeps_the_largest(m: int) -> None:
    scores = torch.rand(5, 3 * m, generator=torch.Generator().manual_seed(m))
    for n in {1, (m + 1) // 2, max(1, m - 1), m}:
        keep = keep_mask(scores, NMPattern(n, m)).view(5, 3, m)
        assert (keep.sum(-1) == n).all()
        grouped = scores.view(5, 3, m)
        lowest_kept = grouped.masked_fill(~keep, torch.inf).amin(-1)
        highest_dropped = grouped.masked_fill(keep, -torch.inf).amax(-1)
        assert (lowest_kept >= highest_dropped).all()


def test_ties_only_in_some_groups_keep_the_earlier_channels() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    keep = keep_mask(scores, NMPattern(2, 4))
    assert keep.tolist() == [[True, True, False, False, True, True, False, False]]


def test_earlier_means_earlier_in_the_group_not_in_the_row() -> None:
    order = torch.tensor([3, 2, 1, 0], dtype=torch.int32)
    keep = keep_mask(torch.ones(1, 4), NMPattern(2, 4), order)
    assert keep.tolist() == [[False, False, True, True]]


def test_nans_are_kept_and_compete_by_position() -> None:
    scores = scores_of(torch.tensor([[torch.nan, torch.inf, -torch.nan, torch.nan]]))
    assert keep_mask(scores, NMPattern(2, 4)).tolist() == [[True, False, True, False]]


def test_minus_zero_equals_zero_even_unscored() -> None:
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert keep_mask(scores, NMPattern(2, 4)).tolist() == [[True, True, False, False]]


def test_a_token_does_not_see_its_neighbours() -> None:
    scores = torch.rand(4, 6, 32, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    whole = keep_mask(scores, NMPattern(8, 16))
    for batch in range(4):
        for position in range(6):
            alone = keep_mask(scores[batch, position], NMPattern(8, 16))
            assert torch.equal(alone, whole[batch, position])
