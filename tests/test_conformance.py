"""Every executor of NMLinear on this machine, on the same cases, against the oracle."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from nmexport import oracle
from nmexport.sparsity.linear import Behaviour, SparseLinear
from nmexport.sparsity.pattern import NMPattern

from tests.support.op_cases import (
    BFLOAT16,
    FLOAT32,
    INTEGERS,
    PATTERNS,
    SHIFTS,
    STORED,
    TYPES,
    LinearCase,
    linear_calls,
    linear_case,
    one_node_model,
    run_session,
    session_of,
    stored_calls,
    with_stored_weight,
)

EVERYTHING = ("bias", "score_scale", "channel_order", "value_scale")


def tensor_from(array):
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype == STORED[3]:
        return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
    if array.dtype in STORED:
        return torch.from_numpy(array.astype(np.int8))
    return torch.from_numpy(array.copy())


def array_from(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def run_torch(case: LinearCase):
    attributes = case.attributes
    behaviour = Behaviour(
        pattern=NMPattern(attributes["n"], attributes["m"]),
        dynamic_shift=bool(attributes.get("dynamic_shift", 0)),
        variance_correction=bool(attributes.get("variance_correction", 0)),
        phase=attributes.get("phase", "all"),
        activation_bits=attributes.get("activation_bits", 0),
        activation_block=attributes.get("activation_block", 32),
    )
    tensors = {name: tensor_from(array) for name, array in case.arrays.items()}
    module = SparseLinear(behaviour, tensors)
    with torch.no_grad():
        return array_from(module(tensor_from(case.x)))


def run_function_body(case: LinearCase):
    model = one_node_model(case.node(), case.x, case.arrays)
    onnx.checker.check_model(model, full_check=True)
    return run_session(session_of(model), case.x)


def run_native(case: LinearCase):
    native = pytest.importorskip("nmexport.runtimes.native")
    library = native.find_library()
    if library is None:
        pytest.skip("the native library is not built here")
    model = one_node_model(case.node(), case.x, case.arrays)
    return run_session(session_of(model, library=library), case.x)


executors = pytest.mark.parametrize(
    "run", [run_torch, run_function_body, run_native], ids=["torch", "function", "native"]
)


@executors
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("variance_correction", [0, 1])
@pytest.mark.parametrize("optional", [(), EVERYTHING], ids=len)
def test_values_are_within_contract(run, dtype, shift, variance_correction, optional):
    case = linear_case(
        dtype=dtype,
        **{**SHIFTS[shift], "optional": (*SHIFTS[shift]["optional"], *optional)},
        variance_correction=variance_correction,
    )
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (1, 48), (2, 1, 48), (2, 3, 48), (2, 2, 1, 48)])
def test_phase_and_rank_are_within_contract(run, phase, shape):
    case = linear_case(
        shape=shape,
        optional=("bias", "shift_weight"),
        dynamic_shift=1,
        variance_correction=1,
        phase=phase,
    )
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("dense", [(), ("dense_scale",), ("dense_bias",)], ids=str)
@pytest.mark.parametrize("bits", [None, 0, 8], ids=["float", "int8", "int8 operand"])
def test_tokens_outside_the_phase_meet_constants_of_their_own(run, dtype, phase, dense, bits):
    case = linear_case(
        shape=(1, 1 if phase == "prefill" else 9, 96),
        dtype=dtype,
        optional=("shift", *EVERYTHING, *dense),
        variance_correction=1,
        phase=phase,
        activation_bits=bits or 0,
    )
    if bits is not None:
        case = with_stored_weight(case, STORED[0], 3)
    assert_within_contract(case, run(case))


@executors
def test_a_dense_token_does_not_meet_what_selection_would(run):
    """Infinities of scales and shifts that are not for it would show as NaN."""
    case = linear_case(
        shape=(3, 96), optional=("bias", "shift", "value_scale", "score_scale"), phase="decode"
    )
    for name in ("shift", "value_scale", "bias"):
        case.arrays[name][5] = np.inf
    assert np.isfinite(run(case)).all()
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_a_wide_layer_is_within_contract(run, tokens):
    case = linear_case(shape=(1, tokens, 1536), out_features=576, optional=("channel_order",))
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("out_features", [1, 3, 17, 65])
def test_odd_widths_are_within_contract(run, out_features):
    for tokens in (1, 5):
        case = linear_case(shape=(tokens, 96), out_features=out_features, optional=("bias",))
        assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [1, 19])
def test_masks_are_the_oracles_bit_for_bit(run, pattern, dtype, tokens):
    """W is the identity, so that y is z where kept: a wrong channel shows, whatever the bound."""
    n, m = pattern
    base = linear_case(
        shape=(tokens, 192),
        dtype=dtype,
        optional=("score_scale", "channel_order"),
        n=n,
        m=m,
        seed=tokens,
    )
    scale = np.round(base.arrays["score_scale"] * 2) / 2 + np.float32(0.5)  # many equal scores
    arrays = {
        "W": np.eye(192, dtype=dtype),
        "score_scale": scale.astype(np.float32),
        "channel_order": base.arrays["channel_order"],
    }
    x = (np.round(base.x.astype(np.float32) * 4) / 4).astype(dtype)
    x[..., ::17] = np.array(1e-7, dtype=dtype)  # denormal in float16
    case = LinearCase(x=x, attributes=base.attributes, arrays=arrays)
    expected = oracle.nm_linear(case.x, arrays["W"], **case.oracle_arguments())
    y = run(case)
    assert np.array_equal(y.astype(np.float64), expected)


@executors
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale_groups", [1, 3, 12])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_int8_weights_are_within_contract(run, dtype, scale_groups, tokens):
    case = linear_case(
        shape=(tokens, 192),
        dtype=dtype,
        scale_groups=scale_groups,
        optional=("bias", "shift_weight", "channel_order", "value_scale"),
        dynamic_shift=1,
        variance_correction=1,
    )
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale_groups", [0, 4])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_an_order_is_a_gather_of_the_input(run, dtype, scale_groups, tokens):
    """Bit for bit: with the order given, and with the input gathered beforehand."""
    case = linear_case(
        shape=(tokens, 192),
        dtype=dtype,
        out_features=40,
        scale_groups=scale_groups,
        optional=("bias", "shift", "score_scale", "channel_order", "value_scale"),
        variance_correction=1,
    )
    arrays = {**case.arrays}
    order = arrays.pop("channel_order")
    x = np.ascontiguousarray(case.x[..., order])
    before = LinearCase(x=x, attributes=case.attributes, arrays=arrays)
    assert np.array_equal(run(case), run(before))


@executors
@given(case=linear_calls())
@settings(max_examples=25, deadline=None)
def test_any_call_is_within_contract_and_gathers_first(run, case):
    """Near ties of a per-token shift are open; what is gathered beforehand decides them alike."""
    arrays = {**case.arrays}
    order = arrays.pop("channel_order")
    x = np.ascontiguousarray(case.x[..., order])
    y = run(case)
    before = LinearCase(x=x, attributes=case.attributes, arrays=arrays)
    assert np.array_equal(y, run(before), equal_nan=True)
    if not case.attributes["dynamic_shift"]:
        assert_within_contract(case, y)


@executors
@pytest.mark.parametrize("tokens", [1, 6])
def test_equal_scores_go_by_gathered_position(run, tokens):
    order = np.random.default_rng(3).permutation(64).astype(np.int32)
    case = LinearCase(
        x=np.ones((tokens, 64), FLOAT32),
        attributes={"n": 3, "m": 8},
        arrays={"W": np.eye(64, dtype=FLOAT32), "channel_order": order},
    )
    for y in run(case):
        assert np.flatnonzero(y).tolist() == [c for c in range(64) if c % 8 < 3]


@executors
@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
@pytest.mark.parametrize("pattern", [(8, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_value_scale_meets_what_is_kept_and_nothing_else(run, pattern, phase, tokens):
    n, m = pattern
    case = linear_case(shape=(1, tokens, 96), optional=("value_scale",), n=n, m=m, phase=phase)
    case.arrays["value_scale"][::3] = 0.0
    case.arrays["value_scale"][1::5] *= -1e3  # scores that saw it would keep other channels
    assert_within_contract(case, run(case))


@executors
def test_masks_over_int8_weights_are_the_oracles(run):
    case = linear_case(
        shape=(4, 192), out_features=192, scale_groups=4, optional=("channel_order",)
    )
    case.arrays["W"][:] = np.eye(192)
    case.arrays["weight_scale"][:] = 2.0
    expected = oracle.nm_linear(case.x, case.arrays["W"], **case.oracle_arguments())
    assert np.array_equal(run(case).astype(np.float64), expected)


def refuses(run, case: LinearCase) -> bool:
    """The native op has no kernel for 8-bit floats; see `test_native_op`."""
    return run is run_native and case.arrays["W"].dtype == STORED[3]


@executors
@given(case=stored_calls())
@settings(max_examples=80, deadline=None)
def test_any_stored_weight_is_within_contract(run, case):
    if case.attributes["dynamic_shift"] and case.attributes["n"] < case.attributes["m"]:
        return  # near ties of its mask are open
    if refuses(run, case):
        return
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("zero_point", [True, "between"])
def test_a_stored_weight_goes_with_every_pattern(run, pattern, stored, groups, zero_point):
    n, m = pattern
    case = with_stored_weight(
        linear_case(shape=(2, 192), optional=("bias", "channel_order"), n=n, m=m),
        stored,
        groups,
        zero_point=stored in INTEGERS and zero_point,
    )
    if refuses(run, case):
        pytest.skip("the native op takes no 8-bit floats")
    assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("stored", INTEGERS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("shape", [(64, 96, 1, 32), (192, 130, 6, 16), (576, 192, 1, 64)])
def test_integers_meet_integers_for_any_number_of_tokens(run, shape, tokens, stored):
    channels, outputs, groups, block = shape
    case = linear_case(
        shape=(tokens, channels),
        out_features=outputs,
        optional=("bias", "channel_order"),
        activation_bits=8,
        activation_block=block,
    )
    for zero_point in (tokens % 2 == 0, "between"):
        stored_case = with_stored_weight(case, stored, groups, zero_point=zero_point)
        assert_within_contract(stored_case, run(stored_case))


def with_minima(case, groups):
    """As GGUF's Q4_1 has them: scales and minima in float16."""
    case = with_stored_weight(case, INTEGERS[2], groups, zero_point="between")
    scale = case.arrays["weight_scale"].astype(np.float16).astype(np.float32)
    minimum = (case.arrays["weight_zero_point"] * scale).astype(np.float16).astype(np.float32)
    arrays = {**case.arrays, "weight_scale": scale, "weight_zero_point": minimum / scale}
    return LinearCase(x=case.x, attributes=case.attributes, arrays=arrays)


@executors
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("bits", [0, 8])
def test_minima_in_halves_are_within_contract(run, pattern, tokens, bits):
    n, m = pattern
    for groups, outputs in ((6, 130), (3, 34)):
        case = with_minima(
            linear_case(
                shape=(tokens, 192),
                out_features=outputs,
                optional=("bias", "channel_order"),
                n=n,
                m=m,
                activation_bits=bits,
                activation_block=32,
            ),
            groups,
        )
        case.arrays["weight_scale"][0, 0] = 0.0  # nothing is left of the group, not its minimum
        assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("spoil", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [2, 6])
def test_zero_points_between_steps_leave_nan_in_its_token(run, spoil, tokens):
    case = with_minima(linear_case(shape=(tokens, 64), activation_bits=8, activation_block=32), 2)
    case.x[1, 20] = spoil
    y = run(case)
    assert np.isnan(y[1]).all()
    assert np.isfinite(np.delete(y, 1, axis=0)).all()
    assert_within_contract(case, y)


@executors
@pytest.mark.parametrize("block", [16, 32, 64])
def test_an_operand_in_8_bits_is_rounded_half_to_even(run, block):
    """Each block's largest value is 127 levels, and the others lie on levels and between them."""
    x = np.zeros((1, 64), FLOAT32)
    x[0, ::16] = 127.0
    x[0, 1:12] = [0.5, 1.5, 2.5, -0.5, -1.5, 3.0, 0.25, -126.5, 125.5, 1e-9, 0.0]
    case = LinearCase(
        x=x,
        attributes={"n": 16, "m": 16, "activation_bits": 8, "activation_block": block},
        arrays={"W": np.eye(64, dtype=np.int8), "weight_scale": np.ones((1, 64), FLOAT32)},
    )
    expected = [0, 2, 2, 0, -2, 3, 0, -126, 126, 0, 0]
    assert run(case)[0, 1:12].tolist() == expected
    assert (
        oracle.nm_linear(x, case.arrays["W"], **case.oracle_arguments())[0, 1:12].tolist()
        == expected
    )


@executors
def test_selection_is_done_before_the_operand_is_rounded(run):
    """What rounds to the same level is told apart by its score, and an empty block is no 0 / 0."""
    x = np.zeros((1, 32), FLOAT32)
    x[0, :16] = 1.0 + np.arange(16, dtype=FLOAT32) * 1e-4
    case = LinearCase(
        x=x,
        attributes={"n": 3, "m": 16, "activation_bits": 8, "activation_block": 16},
        arrays={"W": np.eye(32, dtype=np.int8), "weight_scale": np.ones((1, 32), FLOAT32)},
    )
    y = run(case)
    assert np.flatnonzero(y).tolist() == [13, 14, 15]
    assert len(set(y[0, 13:16].tolist())) == 1


@executors
@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_makes_its_token_nan(run, spoil):
    case = with_stored_weight(
        linear_case(shape=(3, 64), activation_bits=8, activation_block=16), STORED[0], 1
    )
    case.arrays["W"][:] = np.maximum(case.arrays["W"], 1)
    case.x[1, 20] = spoil
    y = run(case)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()
    assert_within_contract(case, y)


@executors
def test_float32_denormals_are_ranked_not_flushed(run):
    x = np.array([[1e-45, 3e-45, 0, 4e-45]], dtype=np.float32)
    case = LinearCase(x=x, attributes={"n": 1, "m": 4}, arrays={"W": np.eye(4, dtype=FLOAT32)})
    assert np.flatnonzero(run(case)).tolist() == [3]


@executors
def test_a_constant_token_loses_its_product_to_the_variance_correction(run):
    """Its variance is zero, so nu is: the contract's formula, taken at its word."""
    case = linear_case(shape=(1, 64), optional=("bias",), variance_correction=1)
    case.x[:] = 2.0
    assert run(case)[0] == pytest.approx(case.arrays["bias"])


@executors
def test_nothing_to_drop_is_dense_below_the_variance_floor_too(run):
    for attributes in ({"n": 16, "m": 16}, {"phase": "decode"}):
        case = linear_case(shape=(1, 2, 16), variance_correction=1, **attributes)
        case.x[:] = 1e-8
        assert_within_contract(case, run(case))


@executors
@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_token(run, spoil):
    case = linear_case(shape=(1, 5, 64), optional=("bias",))
    clean = run(case)
    case.x[0, 1, 9] = spoil
    spoilt = run(case)
    assert not np.isfinite(spoilt[0, 1]).any()
    others = [0, 2, 3, 4]
    assert np.array_equal(spoilt[0, others], clean[0, others])


@executors
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_token_does_not_see_its_neighbours(run, dtype):
    case = linear_case(
        shape=(2, 6, 192),
        dtype=dtype,
        optional=("bias", "shift_weight", "score_scale"),
        dynamic_shift=1,
        variance_correction=1,
    )
    before = run(case)
    case.x[0] *= 100
    case.x[1, 3:] = 0
    after = run(case)
    assert np.array_equal(before[1, :3], after[1, :3])


@executors
def test_two_runs_agree_bit_for_bit(run):
    case = linear_case(shape=(33, 768), out_features=200, variance_correction=1)
    assert np.array_equal(run(case), run(case))


def assert_within_contract(case, y):
    reference = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments())
    bound = reference.bound(case.x.dtype)
    assert y.dtype == case.x.dtype
    assert y.shape == reference.value.shape
    assert oracle.agrees(y, reference.value, bound).all()
