"""Tiny models as the graphs for CUDA run them: with slots on a CPU, and on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest
from nmexport.graph.cuda import rewrite_for_cuda
from nmexport.runtimes import native
from nmexport.runtimes.cuda_model import CudaModel
from nmexport.runtimes.onnxruntime_opening import (
    EXTERNAL_DATA_FOLDER,
    choose_provider,
    open_inference_session,
    session_options,
)
from nmexport.runtimes.slot_session import SlotSession

import onnxruntime

if TYPE_CHECKING:
    from pathlib import Path

POSITIONS = 512


def slot_session(path: Path, *, slots: int = 4, tokens: int = 192, chunk: int = 16) -> SlotSession:
    """Open an exported model as it runs on a GPU, in float32 on a CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(path.parent))
    graph = ir.load(path)
    rewrite_for_cuda(graph, positions=POSITIONS)
    content = ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    model = CudaModel(session, positions=POSITIONS, device="cpu")
    return SlotSession(model, slots=slots, tokens=tokens, chunk=chunk)


def gpu_model(path: Path, positions: int) -> CudaModel:
    """Open an exported model as it runs on a GPU, there; skips where there is none."""
    library = native.find_library()
    if choose_provider(library) != "cuda":
        pytest.skip("needs onnxruntime-gpu and NMEXPORT_CUDA in the build")
    options = session_options(
        library=library, threads=1, config={EXTERNAL_DATA_FOLDER: str(path.parent)}
    )
    graph = ir.load(path)
    rewrite_for_cuda(graph, positions=positions)
    content = ir.to_proto(graph).SerializeToString()
    session = open_inference_session(content, options, "cuda", records_graphs=True)
    return CudaModel(session, positions=positions)
