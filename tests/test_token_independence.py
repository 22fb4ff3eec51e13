"""A token's result is its own: the same bits however requests are ordered, padded, split, batched.

Dynamic shift, variance correction and groups are on: each is a place where a whole batch could
leak into a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.runtimes import native

from tests.support.op_cases import (
    TYPES,
    LinearCase,
    linear_case,
    one_node_model,
    run_session,
    session_of,
)
from tests.test_conformance import run_torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

TOKENS, K, O = 40, 192, 72  # noqa: E741 - the contract's names
Run = "Callable[[NDArray[np.generic]], NDArray[np.generic]]"


@dataclass(frozen=True)
class Requests:
    """Tokens `[40, K]`, and one executor's results of all of them at once as bits `[40, O]`."""

    tokens: NDArray[np.generic]
    run: Callable[[NDArray[np.generic]], NDArray[np.generic]]
    whole: NDArray[np.generic]

    def results(self, requests: NDArray[np.generic]) -> NDArray[np.generic]:
        """Bits of each token's result, `[tokens, O]`, of requests `[B, S, K]`."""
        return bits(self.run(np.ascontiguousarray(requests))).reshape(-1, O)


def bits(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def executor(name: str, case: LinearCase) -> Callable[[NDArray[np.generic]], NDArray[np.generic]]:
    if name == "torch":
        return lambda x: run_torch(replace(case, x=x))
    library = native.find_library() if name == "native" else None
    if name == "native" and library is None:
        pytest.skip("the native library is not built here")
    model = one_node_model(case.node(), case.x, case.arrays)
    session = session_of(model, library=library)
    return lambda x: run_session(session, x)


@pytest.fixture(params=["torch", "function", "native"])
def which(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TYPES, ids=str)
def requests(which: str, request: pytest.FixtureRequest) -> Requests:
    case = linear_case(
        shape=(1, TOKENS, K),
        out_features=O,
        dtype=request.param,
        optional=("bias", "score_scale", "channel_order", "shift_weight"),
        dynamic_shift=1,
        variance_correction=1,
    )
    run = executor(which, case)
    return Requests(case.x[0], run, bits(run(case.x)).reshape(-1, O))


def test_order_does_not_matter(requests: Requests) -> None:
    order = np.random.default_rng(1).permutation(TOKENS)
    assert (requests.results(requests.tokens[order][None]) == requests.whole[order]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 20])
def test_splitting_does_not_matter(requests: Requests, size: int) -> None:
    parts = [
        requests.results(requests.tokens[start : start + size][None])
        for start in range(0, TOKENS, size)
    ]
    assert (np.concatenate(parts) == requests.whole).all()


@pytest.mark.parametrize("batch", [2, 5, 8, 40])
def test_batching_does_not_matter(requests: Requests, batch: int) -> None:
    assert (requests.results(requests.tokens.reshape(batch, -1, K)) == requests.whole).all()


@pytest.mark.parametrize("left", [0, 1, 9])
@pytest.mark.parametrize("filler", [0.0, 1e4, np.nan], ids=str)
def test_padding_does_not_matter(requests: Requests, left: int, filler: float) -> None:
    padding = np.full((left + 3, K), filler).astype(requests.tokens.dtype)
    padded = np.concatenate([padding[:left], requests.tokens, padding[left:]])
    assert (requests.results(padded[None])[left : left + TOKENS] == requests.whole).all()


def test_a_neighbour_does_not_matter(requests: Requests) -> None:
    """A token far larger than the others: a norm or variance of the batch would show."""
    beside = requests.tokens.astype(np.float32)
    beside[1::2] *= 1000
    results = requests.results(beside.astype(requests.tokens.dtype)[None])
    assert (results[::2] == requests.whole[::2]).all()
    assert (results[1::2] != requests.whole[1::2]).any()
