"""Function bodies compute in float32: their 16-bit weights need not lie in memory as such."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from nmexport.runtimes.onnxruntime_opening import open_inference_session, session_options
from onnx import TensorProto, helper

ROWS, COLUMNS = 2048, 8192
WIDE = 4 * ROWS * COLUMNS


def anonymous_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("this system does not say what is anonymous")
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """`Y = X @ float32(W)`, W in float16 in a file of its own."""
    weight = np.ones((ROWS, COLUMNS), np.float16)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["W"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["X", "wide"], ["Y"]),
        ],
        "widened",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, ROWS])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, COLUMNS])],
        [onnx.numpy_helper.from_array(weight, "W")],
    )
    path = tmp_path / "model.onnx"
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, path, save_as_external_data=True, location="model.onnx.data")
    return path


@pytest.mark.parametrize("folds", [True, False])
def test_weights_are_widened_when_they_are_used(model: Path, folds: bool) -> None:
    before = anonymous_bytes()
    session = open_inference_session(
        model, session_options(library=None, threads=1), folds_constants=folds
    )
    taken = anonymous_bytes() - before
    assert (taken > 0.9 * WIDE) == folds
    assert folds or taken < 0.2 * WIDE
    (y,) = session.run(None, {"X": np.ones((1, ROWS), np.float32)})
    assert y[0, 0] == ROWS
