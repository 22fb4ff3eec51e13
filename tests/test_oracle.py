"""The oracle against a brute-force search, and against what the contract says of it in words."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport import oracle
from nmexport.errors import PatternError

from tests.support import op_cases
from tests.support.op_cases import BFLOAT16, FLOAT16, FLOAT32, PATTERNS, TYPES

patterns = st.sampled_from(PATTERNS)
types = st.sampled_from(TYPES)


def groups_of(in_features, m, channel_order):
    order = range(in_features) if channel_order is None else [int(c) for c in channel_order]
    return [list(order)[start : start + m] for start in range(0, in_features, m)]


def beats(a, b):
    """Whether score a ranks above score b, NaN above everything, equals undecided."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and not math.isnan(b)
    return a > b


def brute_force_mask(token, n, m, score_scale=None, channel_order=None):
    """Keep a channel if fewer than n others of its group come first: no sorting anywhere."""
    order = range(len(token)) if channel_order is None else [int(c) for c in channel_order]
    with np.errstate(invalid="ignore"):  # signalling NaNs
        score = [abs(np.float32(v)) for v in token]
    if score_scale is not None:
        with np.errstate(all="ignore"):
            for place, channel in enumerate(order):  # scales lie in gathered order
                score[channel] = np.float32(score[channel]) * np.float32(score_scale[place])
    keep = [False] * len(score)
    for group in groups_of(len(score), m, channel_order):
        for place, channel in enumerate(group):
            ahead = 0
            for other_place, other in enumerate(group):
                is_tie = not beats(score[other], score[channel]) and not beats(
                    score[channel], score[other]
                )
                ahead += beats(score[other], score[channel]) or (is_tie and other_place < place)
            keep[channel] = ahead < n
    return keep


@st.composite
def prune_calls(draw):
    """x [tokens, K] of any bits, n, m, and perhaps a scale and an order."""
    n, m = draw(patterns)
    in_features = m * draw(st.integers(1, 3))
    x = draw(op_cases.activations((draw(st.integers(1, 3)), in_features), draw(types)))
    scales = op_cases.activations((in_features,), FLOAT32).map(np.abs)
    return {
        "x": x,
        "n": n,
        "m": m,
        "score_scale": draw(st.none() | scales),
        "channel_order": draw(st.none() | op_cases.permutations(in_features)),
    }


@given(prune_calls())
@settings(max_examples=150, deadline=None)
def test_mask_equals_brute_force_on_any_bits(call):
    keep = oracle.keep_mask(**call)
    arguments = {k: v for k, v in call.items() if k != "x"}
    for token, kept in zip(call["x"], keep, strict=True):
        assert kept.tolist() == brute_force_mask(token, **arguments)


@given(prune_calls())
@settings(max_examples=60, deadline=None)
def test_exactly_n_kept_in_every_group_and_none_outranked(call):
    call["score_scale"] = None
    keep = oracle.keep_mask(**call)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        score = np.abs(call["x"].astype(np.float32))
    for group in groups_of(keep.shape[-1], call["m"], call["channel_order"]):
        kept, scores = keep[:, group], score[:, group]
        assert (kept.sum(axis=-1) == call["n"]).all()
        nan_first = np.where(np.isnan(scores), np.inf, scores)
        lowest_kept = np.where(kept, nan_first, np.inf).min(axis=-1)
        highest_dropped = np.where(kept, -1.0, nan_first).max(axis=-1)
        assert (lowest_kept >= highest_dropped).all()


@pytest.mark.parametrize(
    ("group", "kept"),
    [
        ([1, 1, 1, 1], [0, 1]),
        ([0.0, -0.0, 0.0, -0.0], [0, 1]),
        ([-0.0, 0.0, 1, 0.0], [0, 2]),
        ([1, -1, 2, -2], [2, 3]),
        ([np.inf, np.nan, 3, -np.inf], [0, 1]),
        ([np.inf, -np.inf, np.nan, np.nan], [2, 3]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 1]),
        ([1e-45, 0, 3e-45, 1.5e-45], [0, 2]),
        ([3.4028235e38, np.inf, -3.4028235e38, 0], [0, 1]),
        ([1, 1, 1, 2], [0, 3]),
    ],
)
def test_ties_and_special_values(group, kept):
    x = np.array(group, dtype=np.float32)
    assert np.flatnonzero(oracle.keep_mask(x, 2, 4)).tolist() == kept


def test_ties_go_to_the_earlier_in_the_group_not_the_lower_channel():
    order = np.array([3, 1, 2, 0], dtype=np.int32)
    keep = oracle.keep_mask(np.ones(4, np.float32), 2, 4, channel_order=order)
    assert np.flatnonzero(keep).tolist() == [1, 3]


def test_the_score_product_is_a_float32_product():
    step = np.float32(2.0**-23)
    x = np.array([1 + 2 * step, 1 + step], dtype=np.float32)
    scale = np.array([1, 1 + step], dtype=np.float32)
    exact = x.astype(np.float64) * scale.astype(np.float64)
    assert exact[1] > exact[0]  # by less than float32 can tell: a tie there
    assert oracle.keep_mask(x, 1, 2, score_scale=scale).tolist() == [True, False]


@given(prune_calls())
@settings(max_examples=60, deadline=None)
def test_channel_order_equals_pruning_the_permuted_input(call):
    order = call["channel_order"]
    if order is None:
        order = np.arange(call["x"].shape[-1], dtype=np.int32)[::-1].copy()
        call["channel_order"] = order
    permuted = {
        **call,
        "x": call["x"][:, order],
        "channel_order": None,
    }
    assert np.array_equal(oracle.keep_mask(**call)[:, order], oracle.keep_mask(**permuted))


@given(st.data(), patterns, types, st.integers(-4, 4))
@settings(max_examples=60, deadline=None)
def test_scaling_by_a_power_of_two_keeps_the_mask(data, pattern, dtype, exponent):
    n, m = pattern
    x = data.draw(op_cases.finite_activations((2, 2 * m), dtype))
    scaled = (x.astype(np.float32) * np.float32(2.0**exponent)).astype(dtype)
    assert np.array_equal(oracle.keep_mask(x, n, m), oracle.keep_mask(scaled, n, m))


@given(prune_calls())
@settings(max_examples=60, deadline=None)
def test_prune_keeps_bits_and_writes_positive_zero(call):
    x = call["x"]
    y = oracle.nm_prune(**call)
    keep = oracle.keep_mask(**call)
    word = np.dtype(f"u{x.dtype.itemsize}")
    assert y.dtype == x.dtype
    assert np.array_equal(y.view(word)[keep], x.view(word)[keep])
    assert not y.view(word)[~keep].any()


@given(st.data(), patterns, types)
@settings(max_examples=40, deadline=None)
def test_pruning_twice_changes_nothing(data, pattern, dtype):
    n, m = pattern
    x = data.draw(op_cases.finite_activations((2, 2 * m), dtype))
    once = oracle.nm_prune(x, n=n, m=m)
    assert np.array_equal(oracle.nm_prune(once, n=n, m=m), once)


def brute_force_linear(token, case, *, sequence_length):
    """y of one token in Python floats and exact sums, straight from the contract's formula."""
    a = {**case.attributes, **case.arrays}
    in_features = len(token)
    token = [token[int(channel)] for channel in a.get("channel_order", range(in_features))]
    x = [float(v) for v in token]
    phase = a.get("phase", "all")
    active = phase == "all" or (phase == "decode") == (sequence_length == 1)
    if not active:
        scale, bias = a.get("dense_scale", [1.0] * in_features), a.get("dense_bias")
        scaled = [v * float(f) for v, f in zip(x, scale, strict=True)]
        return [
            math.fsum(v * float(w) for v, w in zip(scaled, a["W"][:, o], strict=True))
            + (0.0 if bias is None else float(bias[o]))
            for o in range(a["W"].shape[1])
        ]
    eta = [0.0] * in_features
    if a.get("dynamic_shift"):
        eta = [math.fsum(x) / in_features] * in_features
    elif "shift" in a:
        eta = [float(v) for v in np.broadcast_to(a["shift"], in_features)]
    z = [v - e for v, e in zip(x, eta, strict=True)]
    z32 = [np.float32(t) - np.float32(e) for t, e in zip(token, eta, strict=True)]
    keep = brute_force_mask(z32, a["n"], a["m"], a.get("score_scale"))
    s = [v if kept else 0.0 for v, kept in zip(z, keep, strict=True)]
    nu = 1.0
    if a.get("variance_correction") and a["n"] < a["m"]:
        nu = math.sqrt(python_variance(z) / max(python_variance(s), 1e-12))
    s = [v * float(f) for v, f in zip(s, a.get("value_scale", [1.0] * in_features), strict=True)]
    y = []
    for o in range(a["W"].shape[1]):
        value = nu * math.fsum(v * float(w) for v, w in zip(s, a["W"][:, o], strict=True))
        if a.get("dynamic_shift"):
            value += eta[0] * float(a["shift_weight"][o])
        if "bias" in a:
            value += float(a["bias"][o])
        y.append(value)
    return y


def python_variance(values):
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shift", op_cases.SHIFTS.values(), ids=op_cases.SHIFTS)
@pytest.mark.parametrize("variance_correction", [0, 1])
@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
@pytest.mark.parametrize("sequence_length", [1, 2])
def test_linear_equals_brute_force(dtype, shift, variance_correction, phase, sequence_length):
    more = ("bias",)
    if variance_correction:
        more = ("bias", "score_scale", "channel_order", "value_scale")
    if phase != "all":
        more = (*more, "dense_bias", *(("dense_scale",) if variance_correction else ()))
    case = op_cases.linear_case(
        shape=(2, sequence_length, 32),
        out_features=3,
        dtype=dtype,
        **{**shift, "optional": (*shift["optional"], *more)},
        variance_correction=variance_correction,
        phase=phase,
    )
    given_ = oracle.nm_linear(case.x, case.arrays["W"], **case.oracle_arguments())
    for batch in range(2):
        for position in range(sequence_length):
            expected = brute_force_linear(
                case.x[batch, position], case, sequence_length=sequence_length
            )
            assert given_[batch, position] == pytest.approx(expected, rel=1e-11, abs=1e-12)


@given(op_cases.linear_calls(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_order_means_the_gathered_input(case, ties):
    """By definition, bit for bit; ties among the scores go by gathered position as well."""
    x = np.round(case.x.astype(np.float32)).astype(case.x.dtype) if ties else case.x
    arguments = case.oracle_arguments()
    order = arguments.pop("channel_order")
    ordered = oracle.reference(x, case.arrays["W"], channel_order=order, **arguments)
    gathered = oracle.reference(x[..., order], case.arrays["W"], **arguments)
    assert np.array_equal(ordered.value, gathered.value)
    assert np.array_equal(ordered.keep[..., order], gathered.keep)
    assert np.array_equal(ordered.magnitude, gathered.magnitude)


def test_ties_of_a_linear_go_by_gathered_position():
    order = np.array([3, 1, 2, 0], dtype=np.int32)
    result = oracle.reference(
        np.ones(4, np.float32), np.eye(4, dtype=np.float32), n=2, m=4, channel_order=order
    )
    assert np.flatnonzero(result.keep).tolist() == [1, 3]
    assert np.flatnonzero(result.value).tolist() == [0, 1]  # rows of W lie in gathered order


@given(op_cases.linear_calls())
@settings(max_examples=30, deadline=None)
def test_a_value_scale_is_a_scale_of_the_rows(case):
    """The mask and nu do not see it: the same product comes from scaled rows of W."""
    arguments = {**case.oracle_arguments(), "phase": "all"}
    for name in ("dense_scale", "dense_bias"):
        arguments.pop(name, None)
    scale = arguments.pop("value_scale", np.linspace(-1, 2, case.x.shape[-1], dtype=np.float32))
    w = case.arrays["W"].astype(np.float32)
    x = case.x.astype(np.float32)
    arguments.pop("bias", None)
    scaled = oracle.reference(x, w, value_scale=scale, **arguments)
    plain = oracle.reference(x, w, **arguments)
    assert np.array_equal(scaled.keep, plain.keep)
    # A product with the identity shows what meets W, row by row.
    identity = np.eye(len(w), dtype=np.float32)
    weightless = {**arguments}
    if "shift_weight" in weightless:
        weightless["shift_weight"] = np.zeros(len(w), np.float32)
    met = oracle.nm_linear(x, identity, value_scale=scale, **weightless)
    unscaled = oracle.nm_linear(x, identity, **weightless)
    np.testing.assert_allclose(met, unscaled * scale.astype(np.float64), rtol=1e-14)


def test_a_value_scale_of_another_shape_is_refused():
    case = op_cases.linear_case()
    with pytest.raises(ValueError, match="value_scale"):
        oracle.nm_linear(
            case.x, case.arrays["W"], n=8, m=16, value_scale=np.ones(3, dtype=np.float32)
        )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tokens_outside_the_phase_meet_w_and_their_own_constants_alone(phase):
    tokens = 1 if phase == "prefill" else 3
    case = op_cases.linear_case(
        shape=(2, tokens, 32),
        optional=("bias", "shift", "score_scale", "value_scale", "dense_scale", "dense_bias"),
        variance_correction=1,
        phase=phase,
    )
    given_ = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments())
    x = case.x.astype(np.float64) * case.arrays["dense_scale"]
    expected = x @ case.arrays["W"].astype(np.float64) + case.arrays["dense_bias"]
    assert np.array_equal(given_.value, expected)
    assert given_.keep.all()


@pytest.mark.parametrize(
    ("phase", "given_", "says"),
    [
        ("all", {"dense_scale": np.ones(16, np.float32)}, "go with phase decode or prefill"),
        ("all", {"dense_bias": np.ones(4, np.float32)}, "go with phase decode or prefill"),
        ("decode", {"dense_scale": np.ones(4, np.float32)}, "dense_scale is float32"),
        ("decode", {"dense_bias": np.ones(16, np.float32)}, "dense_bias is float32"),
    ],
)
def test_constants_of_dense_tokens_have_their_shape_and_phase(phase, given_, says):
    x, w = np.ones((2, 16), np.float32), np.ones((16, 4), np.float32)
    with pytest.raises(ValueError, match=says):
        oracle.nm_linear(x, w, n=8, m=16, phase=phase, **given_)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_token_depends_on_itself_alone(pattern):
    n, m = pattern
    case = op_cases.linear_case(
        optional=("bias", "shift_weight", "score_scale", "channel_order"),
        dynamic_shift=1,
        variance_correction=1,
        n=n,
        m=m,
    )
    w, arguments = case.arrays["W"], case.oracle_arguments()
    together = oracle.reference(case.x, w, **arguments)
    alone = oracle.reference(case.x[1:, 2:3], w, **arguments)
    assert np.array_equal(together.keep[1, 2], alone.keep[0, 0])
    assert together.value[1, 2] == pytest.approx(alone.value[0, 0], rel=1e-12)


@pytest.mark.parametrize("extra", [{}, {"variance_correction": 1}, op_cases.SHIFTS["dynamic"]])
def test_all_kept_equals_dense(extra):
    case = op_cases.linear_case(n=16, m=16, **extra)
    dense = case.x.astype(np.float64) @ case.arrays["W"].astype(np.float64)
    value = oracle.nm_linear(case.x, case.arrays["W"], **case.oracle_arguments())
    assert value == pytest.approx(dense, rel=1e-5, abs=1e-5)  # shift_weight is float32


@pytest.mark.parametrize(
    ("phase", "shape", "is_sparse"),
    [
        ("decode", (4, 1, 64), True),
        ("decode", (1, 4, 64), False),
        ("decode", (1, 64), True),
        ("decode", (64,), True),
        ("decode", (2, 3, 1, 64), True),
        ("prefill", (4, 1, 64), False),
        ("prefill", (1, 4, 64), True),
        ("prefill", (4, 64), True),
        ("prefill", (64,), False),
        ("all", (64,), True),
    ],
)
def test_phase_is_decided_by_the_second_to_last_axis(phase, shape, is_sparse):
    case = op_cases.linear_case(shape=shape, phase=phase)
    keep = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments()).keep
    assert keep.all() != is_sparse


def test_a_dense_phase_is_dense_even_where_the_variance_is_below_its_floor():
    x = np.full((1, 2, 16), 1e-8, dtype=np.float32)
    w = np.ones((16, 1), dtype=np.float32)
    y = oracle.nm_linear(x, w, n=8, m=16, variance_correction=True, phase="decode")
    assert y == pytest.approx(np.full((1, 2, 1), 16e-8), rel=1e-6)


def test_static_shift_folds_into_the_bias():
    case = op_cases.linear_case(optional=("shift",))
    x, w, shift = (a.astype(np.float64) for a in (case.x, case.arrays["W"], case.arrays["shift"]))
    s = np.where(oracle.keep_mask((case.x - case.arrays["shift"]), 8, 16), x - shift, 0.0)
    unfolded = (s + shift) @ w
    folded_bias = shift @ w
    contract = oracle.nm_linear(case.x, case.arrays["W"], **case.oracle_arguments())
    assert contract + folded_bias == pytest.approx(unfolded, rel=1e-10, abs=1e-12)


def test_dynamic_shift_adds_back_what_it_took():
    case = op_cases.linear_case(optional=("shift_weight",), dynamic_shift=1)
    result = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments())
    x, w = case.x.astype(np.float64), case.arrays["W"].astype(np.float64)
    eta = x.mean(axis=-1, keepdims=True)
    unfolded = (np.where(result.keep, x - eta, 0.0) + eta) @ w
    assert result.value == pytest.approx(unfolded, abs=1e-6)  # shift_weight is float32


def test_variance_correction_restores_the_variance():
    case = op_cases.linear_case(shape=(3, 64), variance_correction=1)
    identity = np.eye(64, dtype=np.float32)
    corrected = oracle.nm_linear(case.x, identity, **case.oracle_arguments())
    dense_variance = case.x.astype(np.float64).var(axis=-1)
    assert corrected.var(axis=-1) == pytest.approx(dense_variance, rel=1e-12)


def test_nan_stays_visible_and_does_not_spread_to_other_tokens():
    case = op_cases.linear_case(shape=(2, 64))
    case.x[0, 5] = np.nan
    y = oracle.nm_linear(case.x, case.arrays["W"], **case.oracle_arguments())
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"n": 0}, PatternError, "out of range"),
        ({"n": 17}, PatternError, "out of range"),
        ({"m": 24, "n": 8}, PatternError, "does not fit 64 channels"),
        ({"w": np.zeros((63, 4), np.float32)}, ValueError, r"W is float32 \[63, 4\]"),
        ({"w": np.zeros((64, 4), np.float16)}, ValueError, "W is float16"),
        ({"bias": np.zeros(3, np.float32)}, ValueError, "bias"),
        ({"bias": np.zeros(4, np.float16)}, ValueError, "bias"),
        ({"shift": np.zeros(2, np.float32)}, ValueError, "shift"),
        ({"shift": np.zeros(1, np.float64)}, ValueError, "shift"),
        ({"score_scale": np.ones(1, np.float32)}, ValueError, "score_scale"),
        ({"channel_order": np.zeros(64, np.int32)}, ValueError, "not a permutation"),
        ({"channel_order": np.arange(64)}, ValueError, "channel_order is int64"),
        ({"phase": "train"}, ValueError, "allowed: all, prefill, decode"),
        ({"dynamic_shift": True}, ValueError, "needs shift_weight"),
        (
            {"dynamic_shift": True, "shift": np.zeros(1, np.float32)},
            ValueError,
            "exclude each other",
        ),
        ({"x": np.zeros((2, 64))}, ValueError, "X is float64"),
        ({"x": np.float32(1)}, ValueError, "rank is 0"),
    ],
)
def test_wrong_arguments_are_named(change, error, says):
    arguments = {
        "x": np.zeros((2, 64), np.float32),
        "w": np.zeros((64, 4), np.float32),
        "n": 8,
        "m": 16,
        **change,
    }
    with pytest.raises(error, match=says):
        oracle.nm_linear(**{**arguments, "x": np.asarray(arguments["x"])})


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_unit_in_last_place_is_the_distance_to_the_next_number(dtype):
    values = np.array([1.0, 1.5, 2.0, -3.0, 0.099609375, 1024.0, 0.0], dtype=dtype)
    upward = np.nextafter(np.abs(values), np.array(np.inf, dtype=dtype))
    distance = upward.astype(np.float64) - np.abs(values).astype(np.float64)
    ulp = oracle.unit_in_last_place(dtype, values.astype(np.float64))
    assert np.array_equal(ulp, distance)
    assert oracle.unit_in_last_place(dtype, np.array([np.inf, np.nan])).tolist() == [np.inf] * 2


def test_tolerance_is_the_contracts():
    value = np.array([0.0, 2.0])
    assert oracle.tolerance(FLOAT32, 64, value).tolist() == [0.0, 2.0 * 8e-5]
    half = oracle.tolerance(FLOAT16, 64, value)
    assert half[1] == pytest.approx(2.0 * 8e-5 + 2 * 2.0**-9)
    wide = oracle.tolerance(FLOAT32, 64, value, magnitude=np.array([1.0, 4.0]))
    assert wide == pytest.approx([8e-5, 32e-5])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_float32_executor_meets_the_bound_and_a_wrong_one_does_not(dtype):
    case = op_cases.linear_case(shape=(16, 1536), out_features=64, dtype=dtype)
    result = oracle.reference(case.x, case.arrays["W"], n=8, m=16)
    bound = result.bound(dtype)
    x, w = case.x.astype(np.float32), case.arrays["W"].astype(np.float32)
    s = np.where(result.keep, x, np.float32(0))
    assert oracle.agrees((s @ w).astype(dtype), result.value, bound).all()
    assert not oracle.agrees((x @ w).astype(dtype), result.value, bound).any(axis=-1).all()
    coarse = (s.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) @ w).astype(dtype)
    assert not oracle.agrees(coarse, result.value, bound).all()


def test_agrees_matches_what_is_not_finite_exactly():
    value = np.array([np.nan, np.inf, -np.inf, 1.0, np.inf])
    actual = np.array([np.nan, np.inf, np.inf, 1.0, np.nan], dtype=np.float32)
    bound = np.full(5, np.inf)
    assert oracle.agrees(actual, value, bound).tolist() == [True, True, False, True, False]


def test_int8_weights_are_their_levels_times_their_scales():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    levels = rng.integers(-127, 128, (64, 5)).astype(np.int8)
    for groups in (1, 2, 4):
        scale = np.exp(rng.standard_normal((groups, 5))).astype(np.float32)
        rows = [scale[k * groups // 64].astype(np.float64) for k in range(64)]
        wide = levels * np.array(rows)
        keep = oracle.keep_mask(x, 8, 16)
        expected = np.where(keep, x, 0).astype(np.float64) @ wide
        actual = oracle.nm_linear(x, levels, n=8, m=16, weight_scale=scale)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("weight", "scale", "words"),
    [
        (np.int8, None, "need weight_scale"),
        (np.float32, np.ones((1, 5), np.float32), "no other takes one"),
        (np.int8, np.ones((1, 4), np.float32), "weight_scale is"),
        (np.int8, np.ones((3, 5), np.float32), "3 groups for 64 channels"),
        (np.int8, np.ones((8, 5), np.float32), "multiple of 16"),
    ],
)
def test_scales_that_do_not_fit_are_refused(weight, scale, words):
    with pytest.raises(ValueError, match=words):
        oracle.nm_linear(
            np.ones((1, 64), np.float32), np.ones((64, 5), weight), n=8, m=16, weight_scale=scale
        )


def test_an_operand_in_8_bits_is_what_a_loop_says():
    """The contract's words, one block, one output, one element at a time."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 96)).astype(np.float32)
    w = rng.integers(-8, 8, (96, 6)).astype(ml_dtypes.int4)
    scale = np.exp(rng.standard_normal((2, 6))).astype(np.float32)
    point = rng.integers(-8, 8, (2, 6)).astype(ml_dtypes.int4)
    keep = oracle.keep_mask(x, 8, 16)
    expected = np.zeros((3, 6))
    for token, out, block in itertools.product(range(3), range(6), range(6)):
        channels = range(16 * block, 16 * block + 16)
        s = [float(x[token, k]) if keep[token, k] else 0.0 for k in channels]
        largest = max(abs(value) for value in s)
        group = channels[0] // 48
        total = sum(
            round(value * 127 / largest) * (int(w[k, out]) - int(point[group, out]))
            for value, k in zip(s, channels, strict=True)
        )
        expected[token, out] += largest / 127 * float(scale[group, out]) * total
    found = oracle.nm_linear(
        x,
        w,
        n=8,
        m=16,
        weight_scale=scale,
        weight_zero_point=point,
        activation_bits=8,
        activation_block=16,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_value_between_two_levels_may_fall_to_either():
    x = np.zeros((1, 16), np.float32)
    x[0, :3] = 127.0, 2.5, 2.4
    arrays = {"weight_scale": np.full((1, 2), 3.0, np.float32), "activation_bits": 8}
    w = np.ones((16, 2), np.int8)
    tie = oracle.reference(x, w, n=16, m=16, activation_block=16, **arrays)
    assert tie.value.tolist() == [[393.0, 393.0]]  # 3 * (127 + 2 + 2)
    assert tie.slack.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(
    ("weight", "changes", "words"),
    [
        (np.float32, {"activation_bits": 8}, "takes a W of integers"),
        (np.int8, {"activation_bits": 4}, "allowed: 0, 8"),
        (np.int8, {"activation_bits": 8, "activation_block": 24}, "multiple of 16"),
        (np.int8, {"activation_bits": 8, "activation_block": 64}, "32 channels that share"),
        (np.int8, {"weight_zero_point": np.zeros((2, 6), np.int16)}, "must be int8 or float32"),
        (np.float32, {"weight_zero_point": np.zeros((2, 6), np.float32)}, "needs weight_scale"),
        (np.uint8, {}, "allowed: float32, int8, int4"),
    ],
)
def test_what_does_not_fit_a_stored_weight_is_refused(weight, changes, words):
    x, w = np.ones((1, 64), np.float32), np.ones((64, 6), weight)
    scale = {} if weight == np.float32 else {"weight_scale": np.ones((2, 6), np.float32)}
    with pytest.raises(ValueError, match=words):
        oracle.nm_linear(x, w, n=8, m=16, **scale, **changes)


def test_four_bits_lie_two_a_byte():
    x, w = np.ones((1, 16), np.float32), np.ones((16, 5), ml_dtypes.uint4)
    with pytest.raises(ValueError, match="must be even"):
        oracle.nm_linear(x, w, n=8, m=16, weight_scale=np.ones((1, 5), np.float32))
