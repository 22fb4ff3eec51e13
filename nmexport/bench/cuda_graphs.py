"""Graphs of products that `nmexport bench cuda` times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from onnx import helper, numpy_helper

from nmexport.bench.cuda_plans import GROUP
from nmexport.graph.contract import op_contract

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from nmexport.bench.cuda_plans import Problem

Side = Literal["matmul", "dense", "sparse", "masked"]
ONNX_TYPES = {"float32": 1, "float16": 10}
_KEEP = 8
_ORDER = "channel_order"


def product_graph(side: Side, problem: Problem, copies: int, rounds: int = 1) -> bytes:
    """Make a model that multiplies by each of `copies` weights in turn, `rounds` times over.

    Weights are inputs. Each round has an input of its own: of two equal products ONNX Runtime would
    compute one.
    """
    element = ONNX_TYPES[problem.dtype]
    products = [(f"X{i}", f"W{j}", f"Y{i}.{j}") for i in range(rounds) for j in range(copies)]
    x_shape = [1, problem.tokens, problem.in_features]
    w_shape = [problem.in_features, problem.out_features]
    y_shape = [1, problem.tokens, problem.out_features]
    info = helper.make_tensor_value_info
    has_order = problem.grouped and side != "matmul"
    graph = helper.make_graph(
        [_product(side, names, has_order=has_order) for names in products],
        "bench",
        [
            *(info(f"X{i}", element, x_shape) for i in range(rounds)),
            *(info(f"W{j}", element, w_shape) for j in range(copies)),
        ],
        [info(y, element, y_shape) for _, _, y in products],
        [numpy_helper.from_array(_order(problem), _ORDER)] if has_order else [],
    )
    opsets = [
        helper.make_opsetid("", 20),
        helper.make_opsetid("nmexport", op_contract().opset_version),
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _product(side: Side, names: tuple[str, str, str], *, has_order: bool) -> onnx.NodeProto:
    x, w, y = names
    if side == "matmul":
        return helper.make_node("MatMul", [x, w], [y])
    inputs = [x, w]
    if has_order:
        names_of = [entry.name for entry in op_contract().ops["NMLinear"].inputs]
        absent = names_of.index(_ORDER) - len(inputs)
        inputs += [""] * absent + [_ORDER]
    kept = GROUP if side == "dense" else _KEEP
    return helper.make_node("NMLinear", inputs, [y], domain="nmexport", n=kept, m=GROUP)


def _order(problem: Problem) -> NDArray[np.int32]:
    """Make a random channel order."""
    return np.random.default_rng(0).permutation(problem.in_features).astype(np.int32)
