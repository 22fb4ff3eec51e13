"""Graphs for the CPU bench: many products of one input, each with a weight of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from nmexport.graph.contract import op_contract

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.sparsity.pattern import NMPattern

Dtype = Literal["float32", "float16", "bfloat16", "int8", "int8:128"]
"""Element type of the weights; activations are float32 with int8 weights, else the same. `int8` has
one scale per output, `int8:128` one per 128 channels, or fewer where 128 does not divide K."""

SCALE_GROUP = 128
"""Channels that share a scale in MatMulNBits, where they divide K; else 32."""
_SMALL_GROUP = 32
_MAX_COPIES = 256
ITEM_BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "int8:128": 1,
}
_UNIT = 16  # channels that share a scale of NMLinear are a multiple of this
NBITS: Mapping[str, int] = {"nbits8": 8, "nbits4": 4}
_DOMAINS: Mapping[str, tuple[str, int]] = {
    "MatMul": ("", 20),
    "MatMulNBits": ("com.microsoft", 1),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A shape with its threads, and the sides that are to be timed on it."""

    in_features: int
    out_features: int
    threads: int
    pattern: NMPattern
    dtypes: tuple[Dtype, ...]
    grouped: bool
    rivals: bool
    rotated_bytes: int
    library: Path

    def weight_bytes(self, dtype: str) -> float:
        """Bytes of one weight."""
        return self.in_features * self.out_features * ITEM_BYTES[dtype]

    def copies(self, item_bytes: float) -> int:
        """Number of weights that together exceed the cache."""
        size = self.in_features * self.out_features * item_bytes
        return min(max(int(self.rotated_bytes / size) + 1, 1), _MAX_COPIES)


def side_names(problem: Problem) -> list[str]:
    """List the sides of a problem: see `nmexport.bench.kernels`."""
    ours = [f"{kind}_{dtype}" for dtype in problem.dtypes for kind in ("dense", "sparse")]
    fits = problem.rivals and problem.in_features % _SMALL_GROUP == 0
    return ["matmul", *(NBITS if fits else ()), *ours, "select"]


def product_model(name: str, problem: Problem, copies: int) -> onnx.ModelProto:
    """Make a model with one product for each weight, all of the same input."""
    kind, _, dtype = name.partition("_")
    element = _element("float32" if not dtype or dtype.startswith("int8") else dtype)
    nodes, initializers = _parts(kind, dtype or "float32", problem, copies)
    columns = problem.in_features if kind == "select" else problem.out_features
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("X", element, [1, "tokens", problem.in_features])],
        [
            helper.make_tensor_value_info(f"Y{i}", element, [1, "tokens", columns])
            for i in range(copies)
        ],
        initializers,
    )
    contract = op_contract()
    ours = (contract.domain, contract.opset_version)
    used = {_DOMAINS.get(node.op_type, ours) for node in nodes} | {("", 20)}
    opsets = [helper.make_opsetid(*entry) for entry in sorted(used)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model


def _parts(
    kind: str, dtype: str, problem: Problem, copies: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    if kind == "select":
        order, constants = _order(problem)
        inputs = ["X", "", order] if order else ["X"]
        nodes = [
            helper.make_node(
                "NMPrune",
                inputs,
                [f"Y{i}"],
                domain="nmexport",
                n=problem.pattern.n,
                m=problem.pattern.m,
            )
            for i in range(copies)
        ]
        return nodes, constants
    if kind in NBITS:
        return _nbits_parts(NBITS[kind], problem, copies)
    weights = [
        _tensor(f"W{i}", _element(dtype.partition(":")[0]), array)
        for i, array in enumerate(_weights(dtype, problem, copies))
    ]
    if kind == "matmul":
        nodes = [helper.make_node("MatMul", ["X", f"W{i}"], [f"Y{i}"]) for i in range(copies)]
        return nodes, weights
    order, constants = _order(problem) if kind == "sparse" else ("", [])
    scale = _scales(dtype, problem) if dtype.startswith("int8") else []
    absent = ["", "", "", ""]  # bias, shift, shift_weight, score_scale
    rest = [*absent, order, "scale" if scale else ""]
    while rest and not rest[-1]:
        rest.pop()
    kept = problem.pattern.n if kind == "sparse" else problem.pattern.m
    nodes = [
        helper.make_node(
            "NMLinear",
            ["X", f"W{i}", *rest],
            [f"Y{i}"],
            domain="nmexport",
            n=kept,
            m=problem.pattern.m,
        )
        for i in range(copies)
    ]
    return nodes, [*weights, *constants, *scale]


def _nbits_parts(
    bits: int, problem: Problem, copies: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Make random weights of MatMulNBits; the layout is [O, groups, bytes of a group]."""
    group = SCALE_GROUP if problem.in_features % SCALE_GROUP == 0 else _SMALL_GROUP
    groups = problem.in_features // group
    shape = (problem.out_features, groups, group * bits // 8)
    random = np.random.default_rng(0)
    scale = np.full(problem.out_features * groups, 1e-3, np.float32)
    tensors = [numpy_helper.from_array(scale, "scale")]
    tensors += [
        _tensor(f"W{i}", _element("uint8"), np.frombuffer(random.bytes(int(np.prod(shape))), "u1"))
        for i in range(copies)
    ]
    for tensor in tensors[1:]:
        tensor.dims[:] = shape
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["X", f"W{i}", "scale"],
            [f"Y{i}"],
            domain="com.microsoft",
            block_size=group,
            accuracy_level=4,  # int8 dot products: the fastest
            K=problem.in_features,
            N=problem.out_features,
            bits=bits,
        )
        for i in range(copies)
    ]
    return nodes, tensors


def _weights(dtype: str, problem: Problem, copies: int) -> list[NDArray[Any]]:
    """Make `copies` arrays `[K, O]` at different addresses; their values repeat."""
    random = np.random.default_rng(0)
    shape = (problem.in_features, problem.out_features)
    some = random.standard_normal(1 << 16, dtype=np.float32) / np.sqrt(shape[0], dtype=np.float32)
    if dtype.startswith("int8"):
        typed: NDArray[Any] = random.integers(-127, 128, some.size).astype(np.int8)
    else:
        typed = some.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return [np.resize(np.roll(typed, index), shape) for index in range(copies)]


def _scales(dtype: str, problem: Problem) -> list[onnx.TensorProto]:
    """Make a scale for each output, or for each output and group of channels."""
    _, _, group = dtype.partition(":")
    rows = math.gcd(int(group), problem.in_features) if group else problem.in_features
    groups = problem.in_features // rows if rows % _UNIT == 0 else 1
    return [numpy_helper.from_array(np.full((groups, problem.out_features), 1e-3, "f4"), "scale")]


def _order(problem: Problem) -> tuple[str, list[onnx.TensorProto]]:
    if not problem.grouped:
        return "", []
    order = np.random.default_rng(1).permutation(problem.in_features).astype(np.int32)
    return "order", [numpy_helper.from_array(order, "order")]


def _element(dtype: str) -> int:
    names = {"float32": "FLOAT"}
    return int(onnx.TensorProto.DataType.Value(names.get(dtype, dtype.upper())))


def _tensor(name: str, element: int, array: NDArray[Any]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=element, dims=array.shape)
    tensor.raw_data = array.tobytes()
    return tensor
