"""On a GPU: a whole build, learning and verification included, runs there and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.report.model import read_report
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_session import choose_provider
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.tiny import save_tiny_model, save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.report.model import Report

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
