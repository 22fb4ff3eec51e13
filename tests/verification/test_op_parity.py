"""Linears against the oracle: what is right passes, what is wrong is seen, ties stay open."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from nmexport.oracle import nm_linear, reference
from nmexport.sparsity.pattern import NMPattern
from nmexport.store.layers import LayerSpec
from nmexport.verification.op_parity import Worst, arguments, expected_of
from nmexport.verification.reference import DeviceProducts, array_from, tensor_from

K, O = 32, 24  # noqa: E741 - the contract's names


def _case(seed: int = 0, **changes: object) -> tuple[LayerSpec, dict, np.ndarray]:
    rng = np.random.default_rng(seed)
    layer = LayerSpec(
        **{
            "name": "one",
            "in_features": K,
            "out_features": O,
            "pattern": NMPattern(8, 16),
            "criterion": "act",
            **changes,
        }
    )
    weight = rng.standard_normal((K, O)).astype(np.float32)
    tensors = {"W": weight, "channel_order": rng.permutation(K).astype(np.int32)}
    if layer.dynamic_shift:
        tensors["shift_weight"] = weight.sum(axis=0)
    return layer, tensors, rng.standard_normal((1, 6, K)).astype(np.float32)


def _output(layer: LayerSpec, tensors: dict, x: np.ndarray) -> np.ndarray:
    return nm_linear(x, tensors["W"], **arguments(layer, tensors)).astype(np.float32)


@pytest.mark.parametrize(
    "changes",
    [{}, {"dynamic_shift": True, "variance_correction": True}, {"phase": "decode"}],
)
def test_a_right_executor_is_within_the_contract(changes: dict) -> None:
    layer, tensors, x = _case(**changes)
    share = expected_of(layer, tensors, x).shares(_output(layer, tensors, x))
    assert share.shape == (6, O)
    assert share.max() < 0.05


def test_weights_that_a_gpu_rounds_first_are_within_a_bound_of_their_own() -> None:
    layer, tensors, x = _case(weight_type="int8")
    rng = np.random.default_rng(1)
    scale = np.exp(rng.standard_normal((2, O))).astype(np.float32) / 127
    tensors |= {"W": rng.integers(-127, 128, (K, O)).astype(np.int8), "weight_scale": scale}
    wide = tensors["W"] * np.repeat(scale, K // 2, axis=0)
    narrow = x.astype(ml_dtypes.bfloat16)
    plain = {"W": wide.astype(ml_dtypes.bfloat16), "channel_order": tensors["channel_order"]}
    y = nm_linear(narrow, plain["W"], **arguments(layer, plain))
    assert expected_of(layer, tensors, narrow).shares(y).max() > 1
    shares = expected_of(layer, tensors, narrow, rounded_operands=1).shares(y)
    assert 0.1 < shares.max() <= 1
    wrong = nm_linear(narrow, np.roll(plain["W"], 1, axis=1), **arguments(layer, plain))
    assert expected_of(layer, tensors, narrow, rounded_operands=1).shares(wrong).max() > 10


def test_shifted_activations_that_a_gpu_rounds_first_are_within_that_bound_too() -> None:
    layer, tensors, x = _case()
    rng = np.random.default_rng(1)
    weight = tensors["W"].astype(ml_dtypes.bfloat16)
    tensors = {"W": weight, "shift": rng.normal(0.3, 0.1, K).astype(np.float32)}
    narrow = x.astype(ml_dtypes.bfloat16)
    kept = reference(narrow, weight, **arguments(layer, tensors)).keep
    s = np.where(kept, narrow.astype(np.float32) - tensors["shift"], 0).astype(ml_dtypes.bfloat16)
    y = (s.astype(np.float32) @ weight.astype(np.float32)).astype(ml_dtypes.bfloat16)
    assert expected_of(layer, tensors, narrow).shares(y).max() > 1
    shares = expected_of(layer, tensors, narrow, rounded_operands=1).shares(y)
    assert 0.1 < shares.max() <= 1


@pytest.mark.parametrize("fault", ["mask", "order", "phase"])
def test_a_wrong_executor_is_seen(fault: str) -> None:
    layer, tensors, x = _case()
    wrong, constants = layer, dict(tensors)
    if fault == "mask":
        wrong = _case(pattern=NMPattern(7, 16))[0]
    elif fault == "order":
        del constants["channel_order"]
    else:
        wrong = _case(phase="decode")[0]
    share = expected_of(layer, tensors, x).shares(_output(wrong, constants, x))
    assert share.max() > 100


def test_nan_is_worse_than_any_number() -> None:
    worst = Worst()
    worst.add("one", np.array([[0.5]]))
    worst.add("two", np.array([[np.nan]]))
    assert worst.report().worst_layer == "two"
    assert not worst.report().within_contract


def test_open_masks_are_left_out_only_with_a_dynamic_shift() -> None:
    """Two channels equally far from the mean: rounding of the mean decides which is kept."""
    layer, tensors, x = _case(dynamic_shift=True)
    del tensors["channel_order"]
    x[0, 2, :16] = [3.0, -3.0] * 4 + [1.0, -1.0] * 4  # kept 3s, dropped 1s: certain
    x[0, 4, :16] = [2.0, -2.0] * 8  # all alike but for the mean
    x[0, 4, 16:] = 0.0  # a mean of zero
    share = expected_of(layer, tensors, x).shares(_output(layer, tensors, x))
    assert share.shape == (5, O)
    still = _case()[0]
    still_tensors = {"W": tensors["W"]}
    share = expected_of(still, still_tensors, x).shares(_output(still, still_tensors, x))
    assert share.shape == (6, O)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_cross_between_numpy_and_torch_bit_by_bit(dtype: type) -> None:
    array = np.array([[1.5, -2.25], [3e-5, 0.0]]).astype(dtype)
    tensor = tensor_from(array)
    assert tensor.dtype == getattr(torch, np.dtype(dtype).name)
    back = array_from(tensor)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"dynamic_shift": True}, {"variance_correction": True}, {"phase": "decode"}]
)
def test_products_on_a_device_are_numpys(changes: dict, dtype: type) -> None:
    layer, tensors, x = _case(**changes)
    tensors = {**tensors, "W": tensors["W"].astype(dtype)}
    x = x.astype(dtype)
    expected = expected_of(layer, tensors, x)
    found = expected_of(layer, tensors, x, products=DeviceProducts("cpu"))
    assert np.array_equal(found.certain, expected.certain)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.bound, expected.bound, rtol=1e-12)
