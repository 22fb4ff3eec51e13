"""On a GPU: a whole build, learning and verification included, runs there and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.report.model import read_report
from nmexport.runtimes import native
from nmexport.runtimes.cuda_session import CudaSession
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.onnxruntime_opening import choose_provider
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.opening import open_session
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.tiny import save_tiny_model, save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.report.model import Report
    from nmexport.runtimes.session import Session
    from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(
    not (tensorrt_library.gpu_is_usable() and torch.cuda.is_available()),
    reason="no NVIDIA GPU with its driver is here, or torch sees none",
)
OPTIONS = (
    *("--pattern", "8:16", "--target", "onnxruntime", "--effort", "fast"),
    *("--calib-samples", "8", "--calib-length", "64"),
    *("--eval-windows", "4", "--eval-length", "64"),
)


def build(folder: Path, *options: str) -> Report:
    """Build a tiny Mistral on a text, and read its report."""
    save_tiny_model(folder / "model", "mistral", head_dim=64, hidden_size=256, sliding_window=None)
    save_tokenizer(folder / "model")
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 400, encoding="utf-8")
    words = ["build", "--model", str(folder / "model"), "--work", str(folder / "work"), *OPTIONS]
    words += ["--calib", str(text), "--eval-data", str(text), *options]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    return read_report(folder / "work" / "report.json")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parity_and_oracle_run_on_the_gpu(tmp_path: Path, dtype: str) -> None:
    if choose_provider(native.find_library()) != "cuda":
        pytest.skip("needs onnxruntime-gpu and NMEXPORT_CUDA in the build")
    report = build(tmp_path, "--dtype", dtype)
    parity = report.parity
    assert parity.extent is not None
    assert "ran on the GPU" in parity.extent
    legs = (parity.torch_onnx, parity.torch_engine, parity.onnx_engine)
    assert [leg.why for leg in legs] == [None] * 3
    assert parity.noise_floor is not None
    # ONNX Runtime may leave out a rounding between two nodes of its own, so that a function body
    # computes on more digits than the value that is returned: what bodies are off by is no error.
    assert parity.linears.onnx.why is None
    for executor in (parity.linears.torch, parity.linears.engine):
        assert executor.why is None
        assert executor.within_contract, executor
    assert parity.dense is not None
    assert parity.dense.error is not None
    assert report.sparsity.achieved == pytest.approx(0.5, abs=1e-3)
    assert report.phases == "decode"
    prompt = np.random.default_rng(0).integers(3, 300, (1, 24))
    folder = tmp_path / "work" / "engine" / "current"
    with open_session(folder) as sparse, open_session(folder, side="dense") as dense:
        assert isinstance(sparse, CudaSession)
        got, wanted = sparse.prefill(prompt), dense.prefill(prompt)
    # In another order of channels, and so of sums.
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.02


def test_integers_run_there_too(tmp_path: Path) -> None:
    """All three sides: the dense model in integers says what the CPU says of it."""
    library = native.find_library()
    if choose_provider(library) != "cuda":
        pytest.skip("needs onnxruntime-gpu and NMEXPORT_CUDA in the build")
    report = build(tmp_path, "--dtype", "float16", "--weights", "int8")
    for executor in (report.parity.linears.torch, report.parity.linears.engine):
        assert executor.why is None
        assert executor.within_contract, executor
    assert report.stored_dense is not None
    assert report.stored_dense.scores.perplexity_ratio == pytest.approx(1.0, abs=0.05)
    folder = tmp_path / "work" / "engine" / "current"
    described = read_engine(folder)
    assert described.cuda is not None
    assert described.stored_model is not None
    ids = np.random.default_rng(0).integers(3, 300, (1, 24))
    with (
        open_session(folder, side="stored") as gpu,
        OrtSession(described.stored_model, library=library) as cpu,
        open_session(folder) as sparse,
        OrtSession(described.model, library=library) as sparse_on_cpu,
    ):
        assert isinstance(gpu, CudaSession)
        assert distance(gpu, cpu, ids) < 0.01
        # Masks fall otherwise where scores nearly tie.
        assert distance(sparse, sparse_on_cpu, ids) < 0.4


def distance(session: Session, wanted: Session, ids: NDArray[np.int64]) -> float:
    """How far logits are apart, as a share of their norm: of a prompt, and of steps after it."""
    worst = 0.0
    for place in range(16, ids.shape[1]):
        if place == 16:
            got, right = session.prefill(ids[:, :16]), wanted.prefill(ids[:, :16])
        else:
            step = ids[:, place - 1 : place]
            got, right = session.decode_step(step), wanted.decode_step(step)
        worst = max(worst, float(np.linalg.norm(got - right) / np.linalg.norm(right)))
    return worst
