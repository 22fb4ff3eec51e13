"""Rows that are pruned where they are made: the graph's values on a CPU, by function bodies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nmexport.graph.cuda import rewrite_for_cuda
from nmexport.graph.fused import FuseResidualNorm
from nmexport.graph.pruned import PruneWhereMade
from nmexport.runtimes.cuda_model import CudaModel
from nmexport.runtimes.cuda_session import CudaSession
from nmexport.runtimes.onnxruntime_opening import EXTERNAL_DATA_FOLDER
from nmexport.runtimes.onnxruntime_session import OrtSession

import onnxruntime
from tests.support.exported import export_folder
from tests.support.op_cases import (
    STORED,
    LinearCase,
    linear_case,
    linear_node,
    one_node_model,
    with_stored_weight,
)
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

POSITIONS = 1024
TOLERANCE = 5e-6
"""Rounding of float32 sums in another order; logits are about 2."""
FLOAT32 = frozenset({ir.DataType.FLOAT})
CHANNELS = 192
Zeros = bool | Literal["between"]


def pruned(path: Path) -> ir.Model:
    model = ir.load(path)
    rewrite_for_cuda(model, positions=POSITIONS)
    PruneWhereMade(FLOAT32)(model)
    return model


def opened(model: ir.Model, folder: Path) -> CudaSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(folder))
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return CudaSession(CudaModel(session, positions=POSITIONS, device="cpu"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    save_tiny_model(folder / "source", "mistral")
    (folder / "export").mkdir()
    return export_folder(folder / "source", folder / "export").model


def test_pruned_rows_give_the_logits_of_the_linears_own_selection(exported: Path) -> None:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (1, 20))
    with opened(pruned(exported), exported.parent) as session, OrtSession(exported) as wanted:
        np.testing.assert_allclose(
            session.prefill(tokens), wanted.prefill(tokens), atol=TOLERANCE, rtol=0
        )
        step = tokens[:, :1]
        np.testing.assert_allclose(
            session.decode_step(step), wanted.decode_step(step), atol=TOLERANCE, rtol=0
        )


def test_what_norms_and_activations_feed_is_pruned_there(exported: Path) -> None:
    names = [node.op_type for node in pruned(exported).graph]
    # The first norm has no residual sum, and attention's output is not ours to prune.
    assert names.count("PrunedResidualNorm") == 3
    assert names.count("PrunedGatedSilu") == 2
    assert names.count("SparseLinear") == 5
    assert names.count("NMLinear") == 3
    assert names.count("ResidualNorm") == 1, "the last one feeds the head"


def stored_model(stored: np.dtype[Any], groups: int, zeros: Zeros, *, bias: bool) -> ir.Model:
    """A norm of a residual sum, and behind it a linear of a stored weight, 4 of 16."""
    case = with_stored_weight(
        linear_case(shape=(2, 3, CHANNELS), optional=("bias", "value_scale") if bias else ()),
        stored,
        groups,
        zero_point=zeros,
    )
    return model_behind_a_norm(case)


def model_behind_a_norm(case: LinearCase) -> ir.Model:
    """A norm of a residual sum, and behind it the linear, 4 of 16."""
    node = linear_node(set(case.arrays), **{**case.attributes, "n": 4})
    proto = one_node_model(node, case.x, case.arrays)
    proto.graph.node[0].input[0] = "row"
    norm = ["total = Add (X, X)", "row = RMSNormalization (total, weight)"]
    for place, text in enumerate(norm):
        proto.graph.node.insert(place, onnx.parser.parse_node(text))
    ones = np.linspace(0.5, 2, CHANNELS, dtype=np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(ones, "weight"))
    for name in ("total", "row"):
        shape = ["B", "S", CHANNELS]
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        proto.graph.value_info.append(info)
    model = ir.from_proto(proto)
    FuseResidualNorm()(model)
    return model


def run(model: ir.Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"X": x})
    return np.asarray(y)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("stored", "groups", "zeros"),
    [
        (STORED[0], 1, False),
        (STORED[0], 4, True),
        (STORED[1], 2, False),
        (STORED[2], 4, True),
        (STORED[2], 2, "between"),
        (STORED[3], 4, False),
    ],
    ids=str,
)
def test_a_stored_weight_stays_as_it_is_and_gives_the_same(
    stored: np.dtype[Any], groups: int, zeros: Zeros, *, bias: bool
) -> None:
    model = stored_model(stored, groups, zeros, bias=bias)
    x = np.random.default_rng(0).standard_normal((2, 3, CHANNELS)).astype(np.float32)
    wanted = run(model, x)
    PruneWhereMade(FLOAT32)(model)
    (linear,) = (node for node in model.graph if node.op_type == "SparseLinear")
    assert linear.inputs[1] is not None
    assert linear.inputs[1].dtype.numpy() == stored
    assert len([value for value in linear.inputs if value is not None]) == (
        3 + bias + (zeros is not False)
    )
    np.testing.assert_allclose(run(model, x), wanted, rtol=1e-5, atol=1e-5)


def test_rounded_activations_stay_with_their_linear() -> None:
    model = stored_model(STORED[0], 1, False, bias=False)
    linear = next(node for node in model.graph if node.op_type == "NMLinear")
    linear.attributes["activation_bits"] = ir.AttrInt64("activation_bits", 8)
    assert not PruneWhereMade(FLOAT32)(model).modified


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize(
    "optional",
    [
        (),
        ("bias", "shift", "score_scale", "value_scale", "channel_order"),
        ("bias", "channel_order", "dense_bias"),
        ("dense_bias",),
    ],
    ids=str,
)
def test_tokens_that_a_phase_leaves_dense_are_gathered_alone(
    tokens: int, phase: str, optional: tuple[str, ...]
) -> None:
    case = linear_case(shape=(2, tokens, CHANNELS), optional=optional, phase=phase)
    model = model_behind_a_norm(case)
    wanted = run(model, case.x)
    PruneWhereMade(FLOAT32)(model)
    assert {node.op_type for node in model.graph} == {"PrunedResidualNorm", "SparseLinear"}
    np.testing.assert_allclose(run(model, case.x), wanted, rtol=1e-5, atol=1e-5)


def test_a_scale_of_dense_tokens_stays_with_its_linear() -> None:
    """No kernel in front knows it: it goes with rounded activations, which no GPU has."""
    case = linear_case(shape=(2, 3, CHANNELS), optional=("dense_scale",), phase="decode")
    assert not PruneWhereMade(FLOAT32)(model_behind_a_norm(case)).modified
