"""The real tritonserver on whole packages: one with a raw engine, and one by its launch script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.serving import client, launch
from nmexport.serving.repository import write_words
from nmexport.serving.triton_config import signature_of
from nmexport.stages import package as package_stage

from tests.serving.test_package import tensorrt_inputs
from tests.support.served import (
    NAME,
    addresses,
    require_tritonserver,
    save_package,
    text_model,
    triton,
)

if TYPE_CHECKING:
    from pathlib import Path

grpc_client = pytest.importorskip("tritonclient.grpc", reason="the client library is not installed")
ENGINE = f"{NAME}_engine"

# Stands in for Triton's TensorRT backend: it gives zeros of the shapes that the engine would.
STAND_IN = """
import numpy as np
import triton_python_backend_utils as backend


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        import json

        self.outputs = json.loads(args["model_config"])["output"]

    def execute(self, requests):
        answers = []
        for request in requests:
            given = {one.name(): one.as_numpy() for one in request.inputs()}
            batch, tokens = given["input_ids"].shape
            total = given["attention_mask"].shape[1]
            tensors = []
            for output in self.outputs:
                dims = [int(size) for size in output["dims"]]
                free = tokens if output["name"] == "logits" else total
                shape = [batch, *[free if size < 0 else size for size in dims]]
                dtype = backend.triton_string_to_numpy(output["data_type"])
                tensors.append(backend.Tensor(output["name"], np.zeros(shape, dtype)))
            answers.append(backend.InferenceResponse(output_tensors=tensors))
        return answers
"""


def save_whole_package(export: Path, inputs: Any) -> Path:
    """A package as the stage writes it for TensorRT; returns its folder."""
    save_package(export, inputs.output)
    plugins, why = package_stage._write_engine(inputs, ENGINE)
    assert why is None
    write_words(inputs.output, source=text_model(export), engine=ENGINE, plugins=plugins)
    return inputs.output


@pytest.mark.slow
def test_a_packaged_engine_is_served_beside_its_text(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation = require_tritonserver()
    backends = launch.backend_folder(installation, tmp_path)
    if backends is None:
        pytest.skip("an installed server has backends of its own")
    package = save_whole_package(tiny_export, tensorrt_inputs(tiny_export, tmp_path, monkeypatch))
    (backends / "tensorrt").mkdir()
    (backends / "tensorrt" / "model.py").write_text(STAND_IN)
    signature = signature_of(tiny_export / "model.onnx")
    with (
        triton(
            package / "model_repository",
            tmp_path / "log",
            backends=backends,
            plugins=launch.plugins_of(package),
        ) as server,
        grpc_client.InferenceServerClient(server.addresses.grpc) as connection,
    ):
        served = connection.get_model_config(ENGINE).config
        assert [one.name for one in served.input] == [one.name for one in signature.inputs]
        assert served.max_batch_size == 4
        for past in (0, 5):
            logits = run_engine(connection, signature, batch=2, tokens=3, past=past)
            assert logits.shape == (2, 3, 384)
        assert client.text_model(server.addresses.http) == NAME
        answer = client.generate(server.addresses.http, NAME, {"text_input": "a", "max_tokens": 2})
        assert answer["text_output"]


@pytest.mark.slow
def test_the_launch_script_starts_a_server_without_its_engine(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launch.why_no_plans(require_tritonserver()) is None:
        pytest.skip("this server would open the plan, which is none")
    package = save_whole_package(tiny_export, tensorrt_inputs(tiny_export, tmp_path, monkeypatch))
    where = addresses()
    ports = {"http": where.http_port, "grpc": where.grpc_port, "metrics": where.metrics_port}
    with subprocess.Popen(
        [package / "launch.sh", *(f"--{name}-port={port}" for name, port in ports.items())],
        env={**os.environ, "PYTHON_ENV": sys.prefix, "OPENAI_PORT": str(where.openai_port)},
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        until = time.monotonic() + 60
        while not launch.is_ready(where.http):
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        assert client.models(where.http) == [NAME]
        answer = client.generate(where.http, NAME, {"text_input": "a", "max_tokens": 2})
        assert answer["text_output"]
        assert launch.serves_openai(where.openai)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 0
    assert f"{ENGINE} is not served" in said


def run_engine(
    connection: Any, signature: Any, *, batch: int, tokens: int, past: int
) -> np.ndarray:
    """One step of the raw engine, through the public names."""
    sizes = {"attention_mask": past + tokens}
    inputs = []
    for spec in signature.inputs:
        free = past if spec.name.startswith("past") else sizes.get(spec.name, tokens)
        shape = [batch, *[free if size is None else size for size in spec.shape[1:]]]
        dtype = np.int64 if spec.element == "INT64" else np.float32
        kind = "INT64" if spec.element == "INT64" else "FP32"
        one = grpc_client.InferInput(spec.name, shape, kind)
        one.set_data_from_numpy(np.ones(shape, dtype))
        inputs.append(one)
    result = connection.infer(ENGINE, inputs)
    assert result.as_numpy("present.1.value").shape[2] == past + tokens
    return result.as_numpy("logits")
