"""Function bodies in ONNX Runtime, with no library of ours, against the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport import oracle
from nmexport.errors import ArtifactError
from nmexport.graph.functions import (
    OPSET,
    Signature,
    function_protos_for,
    functions_for,
    signature_of,
)

from tests.support import op_cases
from tests.support.op_cases import (
    FLOAT32,
    PATTERNS,
    SHIFTS,
    TYPES,
    linear_case,
    linear_node,
    one_node_model,
    prune_node,
    run_session,
    session_of,
)


def assert_same_numbers(actual, expected):
    """Exactly equal; any NaN is as good as another, and so is the sign of zero (see `Where`)."""
    assert actual.dtype == expected.dtype
    with np.errstate(invalid="ignore"):  # signalling NaNs
        numbers = [a.astype(np.float64) for a in (actual, expected)]
    assert np.array_equal(*numbers, equal_nan=True)


def run_linear(case, **model_arguments):
    model = one_node_model(case.node(), case.x, case.arrays, **model_arguments)
    onnx.checker.check_model(model, full_check=True)
    return run_session(session_of(model), case.x)


def assert_within_contract(case, y):
    reference = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments())
    bound = reference.bound(case.x.dtype)
    assert y.dtype == case.x.dtype
    assert oracle.agrees(y, reference.value, bound).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_prune_is_exact_on_any_bits(pattern, dtype):
    n, m = pattern
    shape = (3, 2 * m)
    session = session_of(one_node_model(prune_node(n=n, m=m), np.zeros(shape, dtype), {}))

    @given(op_cases.activations(shape, dtype))
    @settings(max_examples=15, deadline=None)
    def check(x):
        assert_same_numbers(run_session(session, x), oracle.nm_prune(x, n=n, m=m))

    check()


@pytest.mark.parametrize("present", [{"score_scale"}, {"channel_order"}, {"both"}], ids=str)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_prune_with_scale_and_order_is_exact_on_any_bits(present, data):
    n, m = data.draw(st.sampled_from(PATTERNS))
    x = data.draw(op_cases.activations((2, 3 * m), data.draw(st.sampled_from(TYPES))))
    made = {
        "score_scale": np.abs(data.draw(op_cases.activations((3 * m,), FLOAT32))),
        "channel_order": data.draw(op_cases.permutations(3 * m)),
    }
    arrays = {k: v for k, v in made.items() if {k, "both"} & present}
    session = session_of(one_node_model(prune_node(set(arrays), n=n, m=m), x, arrays))
    assert_same_numbers(run_session(session, x), oracle.nm_prune(x, n=n, m=m, **arrays))


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (1, 48), (2, 1, 48), (2, 3, 48), (2, 3, 1, 48)])
def test_phase_and_rank_are_within_contract(phase, shape):
    case = linear_case(
        shape=shape,
        optional=("bias", "shift_weight"),
        dynamic_shift=1,
        variance_correction=1,
        phase=phase,
    )
    assert_within_contract(case, run_linear(case))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_within_contract(pattern):
    n, m = pattern
    case = linear_case(shape=(4, 192), optional=("shift",), variance_correction=1, n=n, m=m)
    assert_within_contract(case, run_linear(case))


def test_a_wide_layer_is_within_contract():
    case = linear_case(shape=(1, 16, 1536), out_features=576, optional=("channel_order",))
    assert_within_contract(case, run_linear(case))


def test_a_scalar_shift_is_broadcast():
    case = linear_case(optional=("shift",))
    case = op_cases.LinearCase(
        x=case.x,
        attributes=case.attributes,
        arrays={**case.arrays, "shift": np.array([0.25], dtype=np.float32)},
    )
    assert_within_contract(case, run_linear(case))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 1, 64)])
def test_no_tokens_give_no_tokens(shape):
    case = linear_case(shape=shape, optional=("channel_order",), phase="prefill")
    assert run_linear(case).shape == (*shape[:-1], 24)


def test_a_nan_reaches_its_own_token_only():
    case = linear_case(shape=(2, 64))
    case.x[0, 5] = np.nan
    y = run_linear(case)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_a_dense_phase_ignores_the_variance_floor():
    case = linear_case(shape=(1, 2, 16), variance_correction=1, phase="decode")
    case.x[:] = 1e-8
    assert_within_contract(case, run_linear(case))


@pytest.mark.parametrize("opset", range(20, OPSET + 1))
def test_bodies_are_valid_in_every_opset_we_promise(opset):
    for phase, present in (("decode", {"W", "shift_weight", "bias"}), ("all", {"W"})):
        case = linear_case(
            optional=tuple(present - {"W"}),
            dynamic_shift=int("shift_weight" in present),
            variance_correction=1,
            phase=phase,
        )
        assert_within_contract(case, run_linear(case, opset=opset))
    model = one_node_model(prune_node(n=2, m=4), case.x, {}, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    session_of(model)


def all_signatures():
    optional = ("bias", "score_scale", "channel_order", "value_scale")
    subsets = [c for r in range(len(optional) + 1) for c in itertools.combinations(optional, r)]
    for inputs, shift, variance, phase, keeps_all in itertools.product(
        subsets, SHIFTS.values(), (0, 1), ("all", "prefill", "decode"), (False, True)
    ):
        present = {"W", *inputs, *shift["optional"]}
        yield linear_node(
            present,
            n=16 if keeps_all else 8,
            m=16,
            phase=phase,
            variance_correction=variance,
            dynamic_shift=shift.get("dynamic_shift", 0),
        )
    for scale, order in itertools.product((False, True), repeat=2):
        present = {n for n, on in (("score_scale", scale), ("channel_order", order)) if on}
        yield prune_node(present, n=8, m=16)
        yield prune_node(present, n=16, m=16)


def test_every_signature_has_a_checked_body_without_branches():
    nodes = list(all_signatures())
    functions = function_protos_for(nodes)
    assert len(functions) == len(nodes)
    identities = {(f.domain, f.name, f.overload) for f in functions}
    assert len(identities) == len(nodes)
    assert {(n.domain, n.op_type, n.overload) for n in nodes} == identities
    for function in functions:
        onnx.checker.check_function(function)
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in function.node}


def test_one_signature_needs_no_overload():
    nodes = [linear_node({"W"}, n=8, m=16), linear_node({"W"}, n=2, m=4), prune_node(n=1, m=4)]
    functions = function_protos_for(nodes)
    assert [(f.name, f.overload) for f in functions] == [("NMLinear", ""), ("NMPrune", "")]
    assert [n.overload for n in nodes] == ["", "", ""]


def test_two_signatures_in_one_model_take_their_own_bodies():
    case = linear_case(shape=(2, 64), out_features=64, optional=("bias", "channel_order"))
    first = linear_node({"W"}, n=8, m=16)
    second = linear_node({"W", "bias", "channel_order"}, n=2, m=4)
    first.output[0] = second.input[0] = "hidden"
    second.name = "second"
    model = one_node_model(first, case.x, case.arrays)
    del model.functions[:]
    model.graph.node.append(second)
    nodes = list(model.graph.node)
    model.functions.extend(function_protos_for(nodes))
    assert [n.overload for n in nodes] == ["plain", "bias_channel_order"]
    onnx.checker.check_model(model, full_check=True)
    y = run_session(session_of(model), case.x)
    w = case.arrays["W"]
    hidden = oracle.nm_linear(case.x, w, n=8, m=16).astype(np.float32)
    arguments = {k: case.arrays[k] for k in ("bias", "channel_order")}
    reference = oracle.reference(hidden, w, n=2, m=4, **arguments)
    assert np.abs(y - reference.value).max() < 1e-4


def test_signature_says_what_the_body_handles():
    node = linear_node(
        {"W", "bias", "shift_weight"},
        n=8,
        m=16,
        dynamic_shift=1,
        variance_correction=1,
        phase="decode",
    )
    signature = signature_of(node)
    assert signature == Signature(
        op_type="NMLinear",
        optional_inputs=("bias", "shift_weight"),
        dynamic_shift=True,
        variance_correction=True,
        phase="decode",
    )
    assert signature.overload == "bias_shift_weight_dynamic_shift_variance_correction_decode"
    assert functions_for([signature, signature])[signature].overload == ""


def test_a_node_that_breaks_the_contract_gets_no_body():
    with pytest.raises(ArtifactError, match="input W is missing"):
        function_protos_for([linear_node(set(), n=8, m=16)])


def test_constants_fold_and_no_second_weight_is_left(tmp_path):
    case = linear_case(optional=("bias", "channel_order", "score_scale"))
    path = tmp_path / "optimized.onnx"
    model = one_node_model(case.node(), case.x, case.arrays)
    session_of(model, optimized=path)
    graph = onnx.load(path).graph
    large = [i.name for i in graph.initializer if np.prod(i.dims) >= case.arrays["W"].size]
    assert len(large) == 1
    operators = [node.op_type for node in graph.node]
    assert "Range" not in operators  # the inverse permutation
    assert operators.count("ScatterElements") == 1
