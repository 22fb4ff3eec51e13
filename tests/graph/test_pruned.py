"""Rows that are pruned where they are made: the graph's values on a CPU, by function bodies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from nmexport.graph.cuda import rewrite_for_cuda
from nmexport.graph.pruned import PruneWhereMade
from nmexport.runtimes.cuda_session import CudaSession
from nmexport.runtimes.onnxruntime_session import EXTERNAL_DATA_FOLDER, OrtSession

import onnxruntime
from tests.support.exported import export_folder
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

POSITIONS = 1024
TOLERANCE = 5e-6
"""Rounding of float32 sums in another order; logits are about 2."""
FLOAT32 = frozenset({ir.DataType.FLOAT})


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
    return CudaSession(session, positions=POSITIONS, device="cpu")


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
