"""What clients of a tritonserver send and read, through `tritonclient` and the metrics page."""

from __future__ import annotations

import json
import queue
import re
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from nmexport.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.serving import launch

grpc_client = pytest.importorskip("tritonclient.grpc", reason="the client library is not installed")
http_client = pytest.importorskip("tritonclient.http", reason="the client library is not installed")

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where the python backend keeps its regions
_PATIENCE_SECONDS = 600
"""For an answer; a guard against a server that hangs, not a bar on one that shares its cores."""
_KINDS = {
    "text_input": ("BYTES", np.object_),
    "messages": ("BYTES", np.object_),
    "stop_words": ("BYTES", np.object_),
    "stream": ("BOOL", np.bool_),
    "chat": ("BOOL", np.bool_),
    "return_num_input_tokens": ("BOOL", np.bool_),
    "return_num_output_tokens": ("BOOL", np.bool_),
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "frequency_penalty": ("FP32", np.float32),
    "presence_penalty": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
}


def tensors(**values: Any) -> list[Any]:
    """Inputs of the text model for tritonclient."""
    inputs = []
    for name, value in values.items():
        kind, dtype = _KINDS[name]
        array = np.array([np.atleast_1d(np.array(value, dtype=dtype))], dtype=dtype)
        one = grpc_client.InferInput(name, list(array.shape), kind)
        one.set_data_from_numpy(array)
        inputs.append(one)
    return inputs


def grpc_stream(
    address: str, model: str, *, parameters: dict[str, Any] | None = None, **values: Any
) -> list[dict[str, Any]]:
    """All responses to one request, over a connection of its own."""
    answers: queue.Queue[Any] = queue.Queue()
    responses = []
    with grpc_client.InferenceServerClient(address) as connection:
        connection.start_stream(lambda result, error: answers.put((result, error)))
        connection.async_stream_infer(
            model, tensors(**values), parameters=parameters, enable_empty_final_response=True
        )
        while True:
            result, error = answers.get(timeout=_PATIENCE_SECONDS)
            if error is not None:
                raise RequestError(str(error))
            response = result.get_response()
            if response.outputs:
                names = [output.name for output in response.outputs]
                responses.append({name: result.as_numpy(name).item() for name in names})
            if response.parameters["triton_final_response"].bool_param:
                return responses


def http_generate(url: str, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One answer over tritonclient's HTTP connection, which has no call of its own for it."""
    with http_client.InferenceServerClient(url.removeprefix("http://")) as connection:
        assert connection.is_model_ready(model)
        answer = connection._post(
            f"v2/models/{model}/generate", json.dumps(fields), headers=None, query_params=None
        )
        outputs: dict[str, Any] = json.loads(answer.read())
    return outputs


def grpc_cancelled(address: str, model: str, **values: Any) -> int:
    """Cancel a request after its first response; the tokens of those that came until then."""
    answers: queue.Queue[Any] = queue.Queue()
    inputs = tensors(**values, stream=True, return_num_output_tokens=True)
    with grpc_client.InferenceServerClient(address) as connection:
        connection.start_stream(lambda result, error: answers.put((result, error)))
        connection.async_stream_infer(model, inputs)
        first, error = answers.get(timeout=_PATIENCE_SECONDS)
        assert error is None
        connection.stop_stream(cancel_requests=True)
    read = [first, *(result for result, _ in list(answers.queue) if result is not None)]
    return sum(result.as_numpy("num_output_tokens").item() for result in read)


def text_of(responses: list[dict[str, Any]]) -> str:
    """The text of all responses to a request."""
    pieces = [response["text_output"] for response in responses]
    return "".join(piece.decode() if isinstance(piece, bytes) else piece for piece in pieces)


def metrics_of(server: launch.Server, model: str) -> dict[str, float]:
    """What the metrics page says of a model, by name without prefix."""
    with urllib.request.urlopen(server.addresses.metrics) as answer:  # noqa: S310  our own server
        text = answer.read().decode()
    lines = re.findall(rf'^nmexport_(\w+){{model="{model}"}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def wait_for(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def regions_of(server: launch.Server) -> set[str]:
    """Regions of shared memory that a server shares with its Python models."""
    lines = [
        " ".join(child.cmdline())
        for child in psutil.Process(server.process.pid).children(recursive=True)
    ]
    return set(re.findall(r"triton_python_backend_shm_region_[-\w]+", "\n".join(lines)))


def regions_left(regions: set[str]) -> set[str]:
    """Those of them that are there still."""
    return {name for name in regions if (_SHARED_MEMORY / name).exists()}
