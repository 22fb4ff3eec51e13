"""On a GPU: the plugin library against the CPU kernels, and engines against ONNX Runtime."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from nmexport.environment import probe
from nmexport.errors import EnvironmentFault
from nmexport.models.source import ModelSource
from nmexport.progress import Silent
from nmexport.recipe import EngineSection, EvaluationSection, LatencySection, ModelSection, Recipe
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt_session import TensorRTSession
from nmexport.stages import engine
from nmexport.stages.inputs import StageInputs

from tests.support.exported import export_folder
from tests.support.plugin_build import ROOT, build_script

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not tensorrt_library.gpu_is_usable(), reason="no NVIDIA GPU with its driver is here"
)
IDS = np.random.default_rng(0).integers(3, 300, (2, 24))


def library() -> Path:
    found = tensorrt_library.find_plugin()
    if found is None:
        pytest.skip(f"the TensorRT plugin is not built: {tensorrt_library.FIX_PLUGIN}")
    return found


def target() -> str:
    for one in tensorrt_library.TARGETS:
        try:
            tensorrt_library.load(one)
        except EnvironmentFault:
            continue
        capability = tensorrt_library.compute_capability()
        if one == "tensorrt" or capability in tensorrt_library.RTX_CAPABILITIES:
            return one
    pytest.skip("no TensorRT here runs on this GPU")


def test_the_plugin_computes_what_the_cpu_kernels_do() -> None:
    folder = build_script().TOOLS / "library"
    if not (folder / "CMakeCache.txt").is_file():
        pytest.skip("the plugin was not built here; make plugin")
    command = [build_script().find_tool("cmake"), "--build", folder, "--target", "gpu_harness"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    done = subprocess.run(
        [folder / "gpu_harness", library()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished engine of a tiny float16 model, for this GPU."""
    library()
    folder = tmp_path_factory.mktemp("engine")
    (folder / "export").mkdir()
    export_folder(tiny_llama, folder / "export", dtype="float16")
    recipe = Recipe(
        model=ModelSection(id="tiny", dtype="float16"),
        target=target(),  # type: ignore[arg-type]
        evaluation=EvaluationSection(length=32, generate_tokens=8),
        latency=LatencySection(prefill_tokens=16, decode_context=16),
        engine=EngineSection(max_batch=2, max_context=64),
    )
    output = folder / "engine"
    output.mkdir()
    source = ModelSource(id="tiny", revision=None, folder=folder, gguf_file=None, digest="0" * 64)
    engine.run(
        StageInputs(
            recipe=recipe,
            source=source,
            environment=probe(),
            progress=Silent(),
            output=output,
            upstream={"export": folder / "export"},
        )
    )
    return output


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_an_engine_says_what_onnx_runtime_says(
    built: Path, side: Literal["dense", "sparse"]
) -> None:
    with (
        TensorRTSession.from_engine(built, side=side) as ours,
        OrtSession.from_engine(built, side=side) as wanted,
    ):
        logits = [(ours.prefill(IDS[:, :9]), wanted.prefill(IDS[:, :9]))]
        for at in range(9, IDS.shape[1]):
            column = IDS[:, at : at + 1]
            logits.append((ours.decode_step(column), wanted.decode_step(column)))
    for got, right in logits:
        # Two runtimes round float16 at different places; masks may differ where scores nearly tie.
        assert np.mean(got.argmax(-1) == right.argmax(-1)) > 0.9
        assert np.median(np.abs(got - right)) < 0.02


def test_a_replayed_step_gives_the_same_bits(built: Path) -> None:
    with TensorRTSession.from_engine(built) as session:
        session.prefill(IDS[:1, :9])
        state = session.keep(session.cache)
        runs = []
        for _ in range(4):  # bound, recorded, replayed, replayed
            session.cache = session.resume(state)
            runs.append(session.decode_step(IDS[:1, 9:10]))
    assert all(np.array_equal(run, runs[0]) for run in runs)


def test_a_build_leaves_timings_for_the_next(built: Path) -> None:
    if target() != "tensorrt":
        pytest.skip("TensorRT-RTX times nothing while it builds")
    from nmexport.runtimes.tensorrt.kernel_cache import timing_cache_path

    version = tensorrt_library.load("tensorrt").__version__
    device = probe().gpus[0].name
    path = timing_cache_path(runtime="tensorrt", version=version, device=device)
    assert path.stat().st_size > 0
