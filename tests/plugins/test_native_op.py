"""The native ops through ONNX Runtime: right at every size, the same bits however work is cut.

Types, shifts, corrections and phases against the oracle: tests/test_conformance.py, which runs
every executor. Here is what only a kernel with tiles, tails, lanes and threads can get wrong.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from nmexport import oracle
from nmexport.resources import resource_path
from nmexport.runtimes import native
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

import onnxruntime
from tests.support.op_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INTEGERS,
    PATTERNS,
    STORED,
    TYPES,
    LinearCase,
    linear_case,
    linear_node,
    one_node_model,
    prune_node,
    run_session,
    session_of,
    with_stored_weight,
)

pytestmark = pytest.mark.skipif(
    native.find_library() is None, reason=f"no native library: {native.why_missing()}"
)

# Session creation and runs through a binding raise different classes for a custom op's status.
REFUSALS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.RuntimeException,
    RuntimeError,
)


def native_session(model, *, threads=1, told=None, huge_pages=None):
    """A session; `told` is what its configuration says of its threads, where it says anything."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if told is not None:
        options.add_session_config_entry(native.THREADS_ENTRY, told)
    if huge_pages is not None:
        options.add_session_config_entry(native.HUGE_PAGES_ENTRY, huge_pages)
    options.register_custom_ops_library(str(native.require_library()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def session_for(case, *, threads=1):
    return native_session(one_node_model(case.node(), case.x, case.arrays), threads=threads)


def assert_right(case, y):
    truth = oracle.reference(case.x, case.arrays["W"], **case.oracle_arguments())
    bound = oracle.tolerance(case.x.dtype, case.x.shape[-1], truth.value, magnitude=truth.magnitude)
    assert oracle.agrees(y, truth.value, bound).all()


@pytest.fixture(params=["portable", "avx2", "avx512", "neon"])
def variant(request):
    library = native.require_library()
    before = native.describe_library(library)["variant"]
    if not native.use_variant(library, request.param):
        pytest.skip("this processor has no such instructions")
    yield request.param
    native.use_variant(library, before)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 128])
@pytest.mark.parametrize("out_features", [1, 3, 17, 1000])
def test_every_tail_of_columns_and_tokens_is_right(tokens, out_features):
    case = linear_case(shape=(tokens, 192), out_features=out_features, optional=("bias",))
    assert_right(case, run_session(session_for(case), case.x))


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (4, 8), (5, 24), (40, 64)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_pattern_is_right(n, m, dtype):
    in_features = 2 * 64 * 31 if m == 31 else 3 * 64 * (m // 16 + 1) // m * m + m
    case = linear_case(
        shape=(2, 3, in_features),
        out_features=40,
        dtype=dtype,
        optional=("channel_order",),
        n=n,
        m=m,
    )
    assert_right(case, run_session(session_for(case), case.x))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_variant_gives_the_same_bits(dtype):
    case = linear_case(
        shape=(9, 1536),
        out_features=77,
        dtype=dtype,
        optional=("bias", "shift", "score_scale", "channel_order"),
        variance_correction=1,
    )
    session = session_for(case)
    y = run_session(session, case.x)
    native.use_variant(native.require_library(), "portable")
    assert y.tobytes() == run_session(session, case.x).tobytes()


@pytest.mark.parametrize("optional", [(), ("bias", "shift_weight")])
def test_a_token_has_the_same_bits_whatever_surrounds_it(optional):
    case = linear_case(
        shape=(1, 150, 576),
        out_features=192,
        optional=optional,
        dynamic_shift=int(bool(optional)),
        variance_correction=1,
    )
    session = session_for(case, threads=1)
    whole = run_session(session, case.x)[0]
    threaded = run_session(session_for(case, threads=3), case.x)[0]
    assert whole.tobytes() == threaded.tobytes()

    order = np.random.default_rng(1).permutation(150)
    assert run_session(session, case.x[:, order])[0].tobytes() == whole[order].tobytes()
    for length in (1, 2, 7, 64):
        part = run_session(session, case.x[:, 40 : 40 + length])[0]
        assert part.tobytes() == whole[40 : 40 + length].tobytes()
    rebatched = run_session(session, case.x.reshape(30, 5, 576))
    assert rebatched.tobytes() == whole.tobytes()
    poisoned = case.x.copy()
    poisoned[0, 1:] = np.nan
    assert run_session(session, poisoned)[0, 0].tobytes() == whole[0].tobytes()


@pytest.mark.parametrize("tokens", [1, 40])
def test_told_threads_change_no_bit(tokens):
    case = linear_case(shape=(tokens, 576), out_features=1000, optional=("bias", "channel_order"))
    model = one_node_model(case.node(), case.x, case.arrays)
    untold = run_session(native_session(model), case.x).tobytes()
    for threads, told in ((1, "1"), (2, "2"), (3, "7")):
        assert run_session(native_session(model, threads=threads, told=told), case.x).tobytes() == (
            untold
        )


@pytest.mark.parametrize("told", ["0", "two", "", "4 ", "99999", "1" * 40])
def test_threads_that_are_no_number_are_refused(told):
    case = linear_case(shape=(1, 32), out_features=8)
    model = one_node_model(case.node(), case.x, case.arrays)
    with pytest.raises(REFUSALS, match="allowed: an integer from 1 to 1024"):
        native_session(model, told=told)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("scale_groups", [0, 1, 4])
@pytest.mark.parametrize("optional", [(), ("bias", "channel_order")])
@pytest.mark.parametrize("phase", ["all", "decode"])  # which leaves longer inputs dense
def test_weights_in_huge_pages_change_no_bit(dtype, scale_groups, optional, phase):
    case = linear_case(
        shape=(1, 40, 576),
        out_features=150,
        dtype=dtype,
        optional=optional,
        scale_groups=scale_groups,
        phase=phase,
    )
    model = one_node_model(case.node(), case.x, case.arrays)
    told_nothing, mapped, other, copied = (
        native_session(model, huge_pages=told) for told in (None, "0", "1", "1")
    )
    del other  # which gives up its part of pages that `copied` goes on reading
    for tokens in (1, 3, 40):
        x = case.x[:, :tokens]
        expected = run_session(told_nothing, x).tobytes()
        assert run_session(mapped, x).tobytes() == expected
        assert run_session(copied, x).tobytes() == expected


@pytest.mark.parametrize("stored", INTEGERS, ids=str)
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("activation_bits", [0, 8])
@pytest.mark.parametrize("zero_point", [True, "between"])
def test_integers_have_the_same_bits_whatever_surrounds_them(
    stored, groups, activation_bits, zero_point
):
    """Alone, in company, on several threads, in huge pages, and as inputs of a run."""
    case = with_stored_weight(
        linear_case(
            shape=(1, 40, 192),
            out_features=300,
            optional=("bias", "channel_order"),
            variance_correction=1,
            activation_bits=activation_bits,
        ),
        stored,
        groups,
        zero_point=groups > 1 and zero_point,
        scale_dtype=FLOAT16 if groups > 1 else FLOAT32,
    )
    case.arrays["weight_scale"] = case.arrays["weight_scale"].astype(np.float32)  # halves exactly
    model = one_node_model(case.node(), case.x, case.arrays)
    session = native_session(model)
    whole = run_session(session, case.x)
    for other in (native_session(model, threads=3), native_session(model, huge_pages="1")):
        assert run_session(other, case.x).tobytes() == whole.tobytes()
    for first, length in ((0, 1), (7, 2), (3, 3), (20, 4), (11, 17)):
        part = run_session(session, case.x[:, first : first + length])
        assert part.tobytes() == whole[:, first : first + length].tobytes()
    assert run_with_input_weights(case).tobytes() == whole.tobytes()


def ort_value(array, data_type):
    if array.dtype not in INTEGERS[1:]:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    nibbles = array.astype(np.uint8).ravel() & 15
    memory = np.zeros(array.shape, np.uint8)  # of which the first half is read
    memory.ravel()[: nibbles.size // 2] = nibbles[::2] | nibbles[1::2] << 4
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(memory, data_type)


def run_with_input_weights(case):
    """The same model with weights, scales and zero points as inputs of the graph."""
    model = one_node_model(case.node(), case.x, case.arrays)
    values = {}
    for tensor in list(model.graph.initializer):
        model.graph.initializer.remove(tensor)
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
        values[tensor.name] = ort_value(case.arrays[tensor.name], tensor.data_type)
    values["X"] = onnxruntime.OrtValue.ortvalue_from_numpy(case.x)
    return native_session(model).run_with_ort_values(None, values)[0].numpy()


@pytest.mark.parametrize("told", ["2", "-1", "yes", ""])
def test_huge_pages_are_asked_for_or_not(told):
    case = linear_case(shape=(1, 32), out_features=8)
    model = one_node_model(case.node(), case.x, case.arrays)
    with pytest.raises(REFUSALS, match=r"huge_pages is .*allowed: an integer from 0 to 1"):
        native_session(model, huge_pages=told)


def test_an_order_of_the_wrong_length_is_refused_as_ever():
    case = linear_case(shape=(1, 64), out_features=8, optional=("channel_order",))
    case.arrays["channel_order"] = np.arange(32, dtype=np.int32)
    session = native_session(one_node_model(case.node(), case.x, case.arrays), huge_pages="1")
    with pytest.raises(REFUSALS, match="channel_order"):
        run_session(session, case.x)


def test_a_refused_run_leaves_the_next_one_right():
    case = linear_case(shape=(2, 48), out_features=8, optional=("shift", "channel_order"))
    model = one_node_model(case.node(), case.x, case.arrays)
    model.graph.input[0].CopyFrom(
        onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["S", "K"])
    )
    session = native_session(model)
    narrow = case.x[:, :32]
    for _ in range(2):
        with pytest.raises(REFUSALS, match="W has shape"):
            session.run(None, {"X": narrow})
        assert_right(case, run_session(session, case.x))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (0, 4, 32)])
def test_no_tokens_give_no_tokens(dtype, shape):
    full = linear_case(shape=(1, 32), out_features=8, dtype=dtype)
    empty = np.zeros(shape, dtype)
    session = native_session(one_node_model(full.node(), empty, full.arrays))
    assert run_session(session, empty).shape == (*shape[:-1], 8)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("optional", [set(), {"score_scale"}, {"channel_order"}])
def test_prune_keeps_what_the_oracle_keeps_on_ties_and_extremes(dtype, optional):
    rng = np.random.default_rng(7)
    special = np.array([0.0, -0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, np.nan, 1e-7, -6e-8])
    x = rng.choice(special, size=(3, 50, 96)).astype(dtype)
    arrays = {
        "score_scale": np.exp(rng.standard_normal(96)).astype(np.float32),
        "channel_order": rng.permutation(96).astype(np.int32),
    }
    arrays = {name: arrays[name] for name in optional}
    for n, m in ((8, 16), (1, 4), (20, 32), (12, 16), (5, 24), (16, 16)):
        model = one_node_model(prune_node(set(arrays), n=n, m=m), x, arrays)
        y = run_session(native_session(model), x)
        expected = oracle.nm_prune(x, n=n, m=m, **arrays)
        assert y.tobytes() == expected.tobytes()


def test_nan_stays_visible_in_its_own_token_only():
    case = linear_case(shape=(3, 64), out_features=5)
    case.x[1, 20] = np.nan
    y = run_session(session_for(case), case.x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [8, 16])
def test_all_kept_and_excluded_phase_are_the_dense_product(dtype, n):
    bias, attributes = ("bias", {}) if n == 16 else ("dense_bias", {"phase": "decode"})
    case = linear_case(
        shape=(1, 6, 96), out_features=33, dtype=dtype, optional=(bias,), n=n, **attributes
    )
    y = run_session(session_for(case), case.x).astype(np.float64)
    dense = case.x.astype(np.float64) @ case.arrays["W"].astype(np.float64)
    step = {FLOAT32: 1e-6, FLOAT16: 2e-3, BFLOAT16: 1.6e-2}[np.dtype(dtype)]
    np.testing.assert_allclose(
        y, dense + case.arrays[bias].astype(np.float64), rtol=step, atol=step
    )


def test_weights_that_are_no_initializers_are_read_at_every_run():
    case = linear_case(shape=(2, 32), out_features=8)
    model = one_node_model(case.node(), case.x, {"W": case.arrays["W"]})
    del model.graph.initializer[:]
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, ["K", "O"])
    )
    session = native_session(model)
    w = case.arrays["W"]
    first = session.run(None, {"X": case.x, "W": w})[0]
    second = session.run(None, {"X": case.x, "W": w * 2})[0]
    np.testing.assert_array_equal(second, first * 2)


def broken(**changes):
    """A model of one NMLinear that no exporter would write, and its X; no function body."""
    case = linear_case(
        shape=(2, 32),
        out_features=8,
        optional=changes.pop("optional", ()),
        **changes.pop("attributes", {}),
    )
    arrays = {**case.arrays, **changes}
    return unchecked_model(LinearCase(case.x, case.attributes, arrays)), case.x


def unchecked_model(case):
    """A model of a node that may break the contract; no function body."""
    graph = onnx.helper.make_graph(
        [case.node()],
        "broken",
        [onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["S", "K"])],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, ["S", "O"])],
        [onnx.numpy_helper.from_array(array, name) for name, array in case.arrays.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nmexport", 2)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


ZEROS = np.zeros(7, np.float32)
TWICE = np.zeros(32, np.int32)
OUTSIDE = np.arange(1, 33, dtype=np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributes": {"n": 0}}, "attribute n is 0; allowed: an integer from 1 to 64"),
        ({"attributes": {"n": 3, "m": 65}}, "attribute m is 65"),
        ({"attributes": {"n": 9, "m": 8}}, "n = 9 exceeds m = 8"),
        ({"attributes": {"dynamic_shift": 2}}, "attribute dynamic_shift is 2"),
        ({"attributes": {"phase": "sometimes"}}, "one of all, prefill, decode"),
        ({"attributes": {"phase": 3}}, "phase is of the wrong type"),
        ({"attributes": {"n": 8, "m": 12}}, "32 channels .* multiple of m = 12"),
        ({"W": np.zeros((16, 8), np.float32)}, r"W has shape \[16, 8\]"),
        ({"optional": ("bias",), "bias": ZEROS}, r"bias has shape \[7\]; allowed: \[8\]"),
        ({"optional": ("shift",), "shift": ZEROS}, r"shift has .*\[32\] or \[1\]"),
        ({"optional": ("score_scale",), "score_scale": ZEROS}, r"score_scale .*\[32\]"),
        ({"optional": ("channel_order",), "channel_order": TWICE}, "occurs twice"),
        ({"optional": ("channel_order",), "channel_order": OUTSIDE}, "out of range"),
        ({"attributes": {"dynamic_shift": 1}}, "needs the input shift_weight"),
        ({"optional": ("dense_bias",)}, "dense_bias goes with phase decode or prefill"),
        ({"optional": ("dense_scale",)}, "dense_scale goes with phase decode or prefill"),
        (
            {"optional": ("dense_scale",), "dense_scale": ZEROS, "attributes": {"phase": "decode"}},
            r"dense_scale .*\[32\]",
        ),
        (
            {"optional": ("dense_bias",), "dense_bias": ZEROS, "attributes": {"phase": "prefill"}},
            r"dense_bias .*\[8\]",
        ),
        (
            {"optional": ("shift", "shift_weight"), "attributes": {"dynamic_shift": 1}},
            "exclude each other",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_in_words(changes, message):
    model, x = broken(**changes)
    with pytest.raises(REFUSALS, match=message):
        run_session(native_session(model), x)


def stored_case(stored=STORED[0], groups=1, out_features=8, **changes):
    case = linear_case(shape=(1, 64), out_features=out_features, **changes)
    return with_stored_weight(case, stored, groups, zero_point=stored in INTEGERS)


@pytest.mark.parametrize(
    ("case", "arrays", "message"),
    [
        (
            stored_case(),
            {"weight_scale": np.ones((3, 8), np.float32)},
            r"\[3, 8\]; allowed: \[1, O",
        ),
        (
            stored_case(),
            {"weight_scale": None, "weight_zero_point": None},
            r"weight_scale \[\]; allowed: \[1, O\]",
        ),
        (stored_case(), {"weight_zero_point": np.zeros((2, 8), np.int8)}, "that of weight_scale"),
        (stored_case(STORED[1], out_features=7), {}, "an even O for integers of 4 bits"),
        (
            stored_case(groups=4, activation_bits=8, activation_block=32),
            {},
            "activation_block is 32; allowed: a multiple of 16 that divides K / G = 16",
        ),
        (stored_case(activation_bits=8, activation_block=24), {}, "activation_block is 24"),
        (stored_case(activation_bits=4), {}, "activation_bits is 4; allowed: 0 or 8"),
        (stored_case(STORED[3]), {}, "float8e4m3fn, which the CPU has no kernel for"),
        (linear_case(shape=(1, 64), activation_bits=8), {}, "goes with an int8, int4 or uint4 W"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stored_weights_that_do_not_fit_are_refused_in_words(case, arrays, message):
    changed = {name: a for name, a in {**case.arrays, **arrays}.items() if a is not None}
    case = LinearCase(x=case.x, attributes=case.attributes, arrays=changed)
    with pytest.raises(REFUSALS, match=message):
        run_session(native_session(unchecked_model(case)), case.x)


def test_a_missing_attribute_is_refused():
    model, x = broken()
    kept = [a for a in model.graph.node[0].attribute if a.name != "n"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    with pytest.raises(REFUSALS, match="attribute n is missing"):
        run_session(native_session(model), x)


def test_defaults_of_absent_attributes_are_the_contracts():
    case = linear_case(shape=(2, 48), out_features=8)
    named = one_node_model(
        linear_node({"W"}, n=8, m=16, dynamic_shift=0, variance_correction=0, phase="all"),
        case.x,
        case.arrays,
    )
    plain = run_session(session_for(case), case.x)
    assert plain.tobytes() == run_session(native_session(named), case.x).tobytes()


NUMBERS = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int32": onnx.TensorProto.INT32,
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    "uint4": onnx.TensorProto.UINT4,
    "float8e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
}


def test_the_registered_schema_is_the_contract():
    contract = json.loads(resource_path("contract.json").read_text(encoding="utf-8"))
    described = native.describe_library(native.require_library())
    assert described["domain"] == contract["domain"]
    assert described["opset_version"] == contract["opset_version"]
    linear = contract["ops"]["NMLinear"]
    stored = next(one for one in linear["inputs"] if one["name"] == "W")["alternatives"]
    expected = [
        expected_op("NMPrune", contract["ops"]["NMPrune"], element) for element in contract["types"]
    ]
    for element in contract["types"]:
        own = {"W": element, "weight_scale": "float32", "weight_zero_point": element}
        expected.append(expected_op("NMLinear", linear, element, own))
        expected += [
            expected_op(
                "NMLinear",
                linear,
                element,
                {"W": weights, "weight_scale": scales, "weight_zero_point": zeros},
            )
            for weights in stored
            for scales in dict.fromkeys(("float32", element))
            for zeros in (weights, "float32")[: 1 if weights == "float8e4m3fn" else 2]
        ]
    assert described["ops"] == expected


def expected_op(name, spec, element, stored=None):
    """What the library says of an op of an element type, with `stored` types by input."""
    return {
        "name": name,
        "inputs": [
            {
                "name": one["name"],
                "type": NUMBERS[
                    (stored or {}).get(one["name"], element if one["type"] == "T" else one["type"])
                ],
                "optional": one["optional"],
            }
            for one in spec["inputs"]
        ],
        "output_type": NUMBERS[element],
        "attributes": [
            {**one, "values": f"|{'|'.join(one['values'])}|"}
            if one["type"] == "string"
            else {key: value for key, value in one.items() if key != "values"}
            for one in spec["attributes"]
        ],
    }


def test_the_library_is_the_packages_own_version():
    import nmexport

    described = native.describe_library(native.require_library())
    assert described["version"] == nmexport.__version__


def test_two_sessions_share_the_library():
    case = linear_case(shape=(2, 48), out_features=8)
    first = session_of(
        one_node_model(case.node(), case.x, case.arrays), library=native.require_library()
    )
    second = session_for(case)
    expected = run_session(first, case.x).tobytes()
    del first
    assert run_session(second, case.x).tobytes() == expected


@pytest.mark.parametrize("optional", [(), ("channel_order",)])
@pytest.mark.parametrize("op_type", ["NMLinear", "NMPrune"])
def test_shapes_are_inferred_through_the_op(op_type, optional):
    arrays = {
        "W": np.zeros((32, 8), np.float32),
        "channel_order": np.arange(32, dtype=np.int32),
    }
    present = {*optional, "W"} if op_type == "NMLinear" else set(optional)
    make = linear_node if op_type == "NMLinear" else prune_node
    graph = onnx.helper.make_graph(
        [make(present, n=8, m=16)],
        "shapes",
        [onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, ["B", "S", 32])],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(arrays[name], name) for name in sorted(present)],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nmexport", 2)]
    session = native_session(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    last = 8 if op_type == "NMLinear" else 32
    assert session.get_outputs()[0].shape == ["B", "S", last]


@pytest.mark.parametrize("shape", [None, [None, None, None, 16]])
def test_what_is_unknown_of_a_shape_stays_unknown(shape):
    graph = onnx.helper.make_graph(
        [prune_node(n=8, m=16)],
        "shapes",
        [onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, None)],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("nmexport", 2)]
    session = native_session(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    x = np.arange(64, dtype=np.float32).reshape(1, 2, 2, 16)
    assert -1 not in session.get_outputs()[0].shape
    assert session.run(None, {"X": x})[0].shape == x.shape
