"""Inputs that the ops are tried on, and a one-node model to run them in ONNX Runtime.

Shared by the tests of every executor, so that all of them face the same cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nmexport.graph.contract import op_contract
from nmexport.graph.functions import function_protos_for
from nmexport.graph.versions import IR_VERSION, OPSET

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnxruntime

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
TYPES = (FLOAT32, FLOAT16, BFLOAT16)
PATTERNS = ((1, 4), (2, 4), (3, 8), (8, 16), (12, 16), (16, 16), (16, 32), (31, 64), (1, 1))

_ONNX_TYPES = {
    FLOAT32: onnx.TensorProto.FLOAT,
    FLOAT16: onnx.TensorProto.FLOAT16,
    BFLOAT16: onnx.TensorProto.BFLOAT16,
    np.dtype(np.int32): onnx.TensorProto.INT32,
    np.dtype(np.int8): onnx.TensorProto.INT8,
    np.dtype(ml_dtypes.int4): onnx.TensorProto.INT4,
    np.dtype(ml_dtypes.uint4): onnx.TensorProto.UINT4,
    np.dtype(ml_dtypes.float8_e4m3fn): onnx.TensorProto.FLOAT8E4M3FN,
}
STORED = tuple(
    np.dtype(kind) for kind in (np.int8, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float8_e4m3fn)
)
INTEGERS = STORED[:3]
_RANGES = {"int8": (-128, 127), "int4": (-8, 7), "uint4": (0, 15)}
SHIFTS: Mapping[str, Mapping[str, Any]] = {
    "none": {"optional": ()},
    "static": {"optional": ("shift",)},
    "dynamic": {"optional": ("shift_weight",), "dynamic_shift": 1},
}
"""Arguments of `linear_case` by how x is shifted."""


def activations(shape: tuple[int, ...], dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    """Any bit pattern of a type (NaNs, infinities, denormals, -0), and arrays full of ties."""
    word = np.dtype(f"u{dtype.itemsize}")
    anything = hnp.arrays(word, shape).map(lambda bits: bits.view(dtype))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, np.nan, 1e-40])
    ties = hnp.arrays(np.float32, shape, elements=few).map(lambda a: a.astype(dtype))
    return anything | ties


def finite_activations(shape: tuple[int, ...], dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    """Values of a size that sums well, many of them equal."""
    elements = st.integers(-64, 64).map(lambda i: np.float32(i / 8))
    return hnp.arrays(np.float32, shape, elements=elements).map(lambda a: a.astype(dtype))


def permutations(length: int) -> st.SearchStrategy[Any]:
    """A `channel_order`."""
    return st.permutations(range(length)).map(lambda order: np.array(order, dtype=np.int32))


def random_activations(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Normal values with outlier channels and a sprinkle of exact ties and zeros."""
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1:]))
    x = np.where(rng.random(shape) < 0.2, np.round(x), x)
    return x.astype(dtype)


@dataclass(frozen=True)
class LinearCase:
    """One NMLinear call: arguments of the oracle and of a node."""

    x: np.ndarray[Any, Any]
    attributes: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray[Any, Any]]
    """W and the optional inputs that are present."""

    def oracle_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `oracle.reference` besides x and w."""
        flags = ("dynamic_shift", "variance_correction")
        attributes = {k: bool(v) if k in flags else v for k, v in self.attributes.items()}
        return {**attributes, **{k: v for k, v in self.arrays.items() if k != "W"}}

    def node(self) -> onnx.NodeProto:
        """The node; inputs carry their contract names."""
        return linear_node(set(self.arrays), **self.attributes)


def linear_case(
    *,
    shape: tuple[int, ...] = (2, 5, 192),
    out_features: int = 24,
    dtype: np.dtype[Any] = FLOAT32,
    optional: tuple[str, ...] = (),
    scale_groups: int = 0,
    seed: int = 0,
    **attributes: Any,
) -> LinearCase:
    """A random call with the optional inputs named; with scale groups, of int8 weights."""
    rng = np.random.default_rng(seed)
    in_features = shape[-1]
    w = (rng.standard_normal((in_features, out_features)) / np.sqrt(in_features)).astype(dtype)
    made = {
        "bias": rng.standard_normal(out_features).astype(dtype),
        "shift": rng.standard_normal(in_features).astype(np.float32) * np.float32(0.2),
        "shift_weight": w.astype(np.float64).sum(axis=0).astype(np.float32),
        "score_scale": np.exp(rng.standard_normal(in_features)).astype(np.float32),
        "channel_order": rng.permutation(in_features).astype(np.int32),
        # Of numbers of its own: the other draws stay what they were without it.
        "value_scale": np.exp(
            0.3 * np.random.default_rng(seed + 1).standard_normal(in_features)
        ).astype(np.float32),
        "dense_scale": np.exp(
            0.3 * np.random.default_rng(seed + 2).standard_normal(in_features)
        ).astype(np.float32),
        "dense_bias": np.random.default_rng(seed + 3).standard_normal(out_features).astype(dtype),
    }
    arrays = {"W": w, **{name: made[name] for name in optional}}
    if scale_groups:
        arrays["W"] = rng.integers(-127, 128, w.shape).astype(np.int8)
        scales = np.exp(rng.standard_normal((scale_groups, out_features))) / 127
        arrays["weight_scale"] = (scales / np.sqrt(in_features)).astype(np.float32)
    return LinearCase(
        x=random_activations(rng, shape, dtype) + np.array(0.5, dtype=dtype),
        attributes={"n": 8, "m": 16, **attributes},
        arrays=arrays,
    )


def with_stored_weight(
    case: LinearCase,
    stored: np.dtype[Any],
    groups: int,
    *,
    zero_point: bool | Literal["between"] = False,
    scale_dtype: np.dtype[Any] = FLOAT32,
    seed: int = 0,
) -> LinearCase:
    """The same call with a weight of a stored type in place of its own.

    Zero points are of its type, or float32 `between` its steps; one in eight is -1 for a group of
    zeros, as a block of equal weights has it.
    """
    rng = np.random.default_rng(seed)
    shape = case.arrays["W"].shape

    def values(size: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if stored.name not in _RANGES:
            return rng.standard_normal(size).astype(stored)
        low, high = _RANGES[stored.name]
        return rng.integers(low, high + 1, size).astype(stored)

    scales = np.exp(0.5 * rng.standard_normal((groups, shape[1]))) / np.sqrt(shape[0])
    largest = _RANGES.get(stored.name, (0, 2))[1]
    arrays = {
        **case.arrays,
        "W": values(shape),
        "weight_scale": (scales / largest).astype(scale_dtype),
    }
    if zero_point == "between":
        low, high = _RANGES[stored.name]
        points = rng.uniform(low - 1, high + 1, (groups, shape[1])).astype(np.float32)
        equal = rng.random(points.shape) < 1 / 8
        points[equal] = -1
        arrays["W"][np.repeat(equal, shape[0] // groups, axis=0)] = 0
        arrays["weight_zero_point"] = points
    elif zero_point:
        arrays["weight_zero_point"] = values((groups, shape[1]))
    return LinearCase(x=case.x, attributes=case.attributes, arrays=arrays)


@st.composite
def _phases(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A phase, and the inputs of tokens outside it."""
    phase = draw(st.sampled_from(("all", "prefill", "decode")))
    if phase == "all":
        return phase, ()
    return phase, tuple(sorted(draw(st.sets(st.sampled_from(("dense_scale", "dense_bias"))))))


@st.composite
def stored_calls(draw: st.DrawFn) -> LinearCase:
    """A random call of a stored weight: any type, any scales, its operand rounded or not."""
    n, m = draw(st.sampled_from(PATTERNS))
    stored = draw(st.sampled_from(STORED))
    dtype = draw(st.sampled_from(TYPES))
    channels = int(np.lcm(m, draw(st.sampled_from((16, 48, 96)))))
    whole = channels // 16
    groups = draw(st.sampled_from([g for g in (1, 2, 3, whole) if whole % g == 0]))
    block = draw(st.sampled_from([b for b in (16, 32, 48) if channels // groups % b == 0]))
    shift = draw(st.sampled_from([(), ("shift",), ("shift_weight",)]))
    more = draw(st.sets(st.sampled_from(("bias", "score_scale", "value_scale", "channel_order"))))
    phase, dense = draw(_phases())
    bits = draw(st.sampled_from((0, 8))) if stored in INTEGERS else 0
    case = linear_case(
        shape=(draw(st.integers(1, 3)), channels),
        out_features=draw(st.sampled_from((2, 6, 34))),
        dtype=dtype,
        optional=(*shift, *sorted(more), *dense),
        dynamic_shift=int("shift_weight" in shift),
        variance_correction=draw(st.integers(0, 1)),
        phase=phase,
        n=n,
        m=m,
        activation_bits=bits,
        activation_block=block,
        seed=draw(st.integers(0, 1000)),
    )
    return with_stored_weight(
        case,
        stored,
        groups,
        zero_point=draw(st.sampled_from((False, True, "between"))) if stored in INTEGERS else False,
        scale_dtype=draw(st.sampled_from((FLOAT32, dtype))),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def linear_calls(draw: st.DrawFn) -> LinearCase:
    """A random call with an order and any of the inputs and attributes that go together."""
    n, m = draw(st.sampled_from(PATTERNS))
    shift = draw(st.sampled_from([(), ("shift",), ("shift_weight",)]))
    more = draw(st.sets(st.sampled_from(("bias", "score_scale", "value_scale"))))
    phase, dense = draw(_phases())
    return linear_case(
        shape=(draw(st.integers(1, 3)), 3 * m),
        out_features=5,
        dtype=draw(st.sampled_from(TYPES)),
        optional=(*shift, *sorted(more), "channel_order", *dense),
        dynamic_shift=int("shift_weight" in shift),
        variance_correction=draw(st.integers(0, 1)),
        phase=phase,
        n=n,
        m=m,
        seed=draw(st.integers(0, 1000)),
    )


def linear_node(present: set[str], **attributes: Any) -> onnx.NodeProto:
    """An NMLinear node with the inputs named in `present` besides X."""
    return _node("NMLinear", present, attributes)


def prune_node(present: set[str] | None = None, **attributes: Any) -> onnx.NodeProto:
    """An NMPrune node with the inputs named in `present` besides X."""
    return _node("NMPrune", present or set(), attributes)


def _node(op_type: str, present: set[str], attributes: Mapping[str, Any]) -> onnx.NodeProto:
    inputs = [spec.name for spec in op_contract().ops[op_type].inputs]
    names = [name if name == "X" or name in present else "" for name in inputs]
    while not names[-1]:
        names.pop()
    return onnx.helper.make_node(
        op_type, names, ["Y"], name=op_type, domain="nmexport", **attributes
    )


def one_node_model(
    node: onnx.NodeProto,
    x: np.ndarray[Any, Any],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    *,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A model of one node with its function body; `arrays` become initializers."""
    last = arrays["W"].shape[1] if node.op_type == "NMLinear" else x.shape[-1]
    free = [f"axis_{i}" for i in range(x.ndim - 1)]
    element_type = _ONNX_TYPES[x.dtype]
    graph = onnx.helper.make_graph(
        [node],
        "one_node",
        [onnx.helper.make_tensor_value_info("X", element_type, [*free, x.shape[-1]])],
        [onnx.helper.make_tensor_value_info("Y", element_type, [*free, last])],
        [
            onnx.helper.make_tensor(
                name, _ONNX_TYPES[array.dtype], array.shape, _raw(array), raw=True
            )
            for name, array in arrays.items()
        ],
    )
    return onnx.helper.make_model(
        graph,
        functions=function_protos_for([node], opset=opset),
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid("nmexport", op_contract().opset_version),
        ],
        ir_version=IR_VERSION,
    )


def _raw(array: np.ndarray[Any, Any]) -> bytes:
    """Bytes as ONNX lays them: of 4 bits, two a byte, the lower index in the low half."""
    if array.dtype not in STORED[1:3]:
        return array.tobytes()
    low, high = array.astype(np.int8).reshape(-1, 2).T & 15
    return (low | high << 4).astype(np.uint8).tobytes()


def session_of(
    model: onnx.ModelProto, *, library: Path | None = None, optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """A single-threaded CPU session; `optimized` is where the optimised graph is left."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_session(
    session: onnxruntime.InferenceSession, x: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """`Y` for `X`, bfloat16 included, which the runtime's NumPy interface does not know."""
    last = session.get_outputs()[0].shape[-1]
    y = np.full((*x.shape[:-1], last), 7, dtype=x.dtype)
    x = np.ascontiguousarray(x)
    element_type = _ONNX_TYPES[x.dtype]
    binding = session.io_binding()
    binding.bind_input("X", "cpu", 0, element_type, x.shape, x.ctypes.data)
    binding.bind_output("Y", "cpu", 0, element_type, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    return y
