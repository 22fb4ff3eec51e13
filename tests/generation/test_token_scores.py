"""How likely tokens were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nmexport.generation.token_scores import score_token
from scipy.special import log_softmax


@given(
    logits=hnp.arrays(np.float32, 8, elements=st.floats(-1e4, 1e4, width=32)),
    count=st.integers(0, 8),
)
def test_a_score_is_the_log_of_the_softmax(logits: np.ndarray, count: int) -> None:
    score = score_token(logits, 3, likeliest=count, offset=5)
    expected = log_softmax(logits.astype(np.float64))
    assert score.log_probability == pytest.approx(expected[3], abs=1e-9)
    order = np.argsort(-logits, kind="stable")[:count]
    assert [token for token, _ in score.likeliest] == order.tolist()
    assert [value for _, value in score.likeliest] == pytest.approx(expected[order], abs=1e-9)
