"""Tiny models in sessions with slots, on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from nmexport.graph.cuda import rewrite_for_cuda
from nmexport.runtimes.cuda_model import CudaModel
from nmexport.runtimes.onnxruntime_opening import EXTERNAL_DATA_FOLDER
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
