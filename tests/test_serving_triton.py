"""The real tritonserver on a tiny model: what clients see, what they may do wrong, how it ends."""

from __future__ import annotations

import json
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import EnvironmentFault, RequestError
from nmexport.generation import generate
from nmexport.serving import client, launch
from nmexport.serving.bundle import REFERENCE
from nmexport.serving.stub_environment import make_environment
from nmexport.serving.triton_config import CONFIG, PLAN, engine_config, signature_of, to_text

from tests.served import (
    NAME,
    engine_document,
    require_tritonserver,
    save_package,
    triton,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

grpc_client = pytest.importorskip("tritonclient.grpc", reason="the client library is not installed")
http_client = pytest.importorskip("tritonclient.http", reason="the client library is not installed")

PROMPT = "The quick brown"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where the python backend keeps its regions


@pytest.fixture(scope="module")
def work(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with an export, an engine and a package."""
    require_tritonserver()
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_export, root / "export" / "current")
    engine = root / "engine" / "current"
    engine.mkdir(parents=True)
    (engine / "engine.json").write_text(json.dumps(engine_document()))
    save_package(root / "export" / "current", root / "package" / "current")
    return root


@pytest.fixture(scope="module")
def server(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with triton(launch.package_folder(work) / "model_repository", log) as running:
        yield running


@pytest.fixture
def grpc(server: launch.Server) -> Iterator[Any]:
    with grpc_client.InferenceServerClient(server.addresses.grpc) as connection:
        yield connection


def metric(server: launch.Server, name: str) -> float:
    with urllib.request.urlopen(server.addresses.metrics) as answer:  # noqa: S310  our own server
        text = answer.read().decode()
    found = re.search(rf'^{name}{{model="{NAME}"}} (\S+)$', text, re.MULTILINE)
    assert found, name
    return float(found[1])


def wait_for(holds: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def tensors(**values: Any) -> list[Any]:
    """Inputs for tritonclient."""
    kinds = {
        "text_input": ("BYTES", np.object_),
        "messages": ("BYTES", np.object_),
        "stop_words": ("BYTES", np.object_),
        "stream": ("BOOL", np.bool_),
        "chat": ("BOOL", np.bool_),
        "max_tokens": ("INT32", np.int32),
        "temperature": ("FP32", np.float32),
        "top_p": ("FP32", np.float32),
        "frequency_penalty": ("FP32", np.float32),
        "presence_penalty": ("FP32", np.float32),
        "seed": ("UINT64", np.uint64),
    }
    inputs = []
    for name, value in values.items():
        kind, dtype = kinds[name]
        array = np.array([np.atleast_1d(np.array(value, dtype=dtype))], dtype=dtype)
        one = grpc_client.InferInput(name, list(array.shape), kind)
        one.set_data_from_numpy(array)
        inputs.append(one)
    return inputs


def grpc_stream(address: str, **values: Any) -> list[dict[str, Any]]:
    """All responses to one request, over a connection of its own."""
    answers: queue.Queue[Any] = queue.Queue()
    responses = []
    with grpc_client.InferenceServerClient(address) as connection:
        connection.start_stream(lambda result, error: answers.put((result, error)))
        parameters = values.pop("parameters", None)
        connection.async_stream_infer(
            NAME, tensors(**values), parameters=parameters, enable_empty_final_response=True
        )
        while True:
            result, error = answers.get(timeout=30)
            if error is not None:
                raise RequestError(str(error))
            response = result.get_response()
            if response.outputs:
                names = [output.name for output in response.outputs]
                responses.append({name: result.as_numpy(name).item() for name in names})
            if response.parameters["triton_final_response"].bool_param:
                return responses


def text_of(responses: list[dict[str, Any]]) -> str:
    pieces = [response["text_output"] for response in responses]
    return "".join(piece.decode() if isinstance(piece, bytes) else piece for piece in pieces)


# -- text -----------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_generate(server: launch.Server, work: Path) -> None:
    expected = "".join(generate(work, PROMPT, max_tokens=24))
    assert expected
    fields = {"text_input": PROMPT, "max_tokens": 24}
    whole = client.generate(server.addresses.http, NAME, fields)
    streamed = list(client.stream(server.addresses.http, NAME, fields))
    over_grpc = grpc_stream(
        server.addresses.grpc, text_input=PROMPT.encode(), max_tokens=24, stream=True
    )
    assert whole["text_output"] == text_of(streamed) == text_of(over_grpc) == expected
    assert len(streamed) > 5
    assert [one["finish_reason"] for one in streamed[:-1]] == [""] * (len(streamed) - 1)
    for last in (whole, streamed[-1]):
        assert last["finish_reason"] in {"stop", "length"}
        assert last["prompt_tokens"] > 0
        assert 0 < last["completion_tokens"] <= 24
    assert over_grpc[-1]["finish_reason"].decode() == whole["finish_reason"]


def test_tritonclient_over_http_sees_a_ready_and_complete_model(server: launch.Server) -> None:
    where = server.addresses.http.removeprefix("http://")
    with http_client.InferenceServerClient(where) as connection:
        assert connection.is_server_ready()
        assert connection.is_model_ready(NAME)
        metadata = connection.get_model_metadata(NAME)
        config = connection.get_model_config(NAME)
        assert {one["name"] for one in metadata["inputs"]} >= {"text_input", "stream", "max_tokens"}
        assert config["model_transaction_policy"]["decoupled"] is True
        asked = connection._post(  # what its users call for generate, which it does not wrap
            f"v2/models/{NAME}/generate",
            json.dumps({"text_input": PROMPT, "max_tokens": 3}),
            headers=None,
            query_params=None,
        )
        assert json.loads(asked.read())["completion_tokens"] <= 3


def test_options_come_as_inputs_or_as_parameters(server: launch.Server) -> None:
    url = server.addresses.http
    options = {"max_tokens": 12, "temperature": 0.9, "seed": 7, "top_k": 20, "top_p": 0.9}
    flat = client.generate(url, NAME, {"text_input": PROMPT, **options})
    nested = client.generate(url, NAME, {"text_input": PROMPT, "parameters": options})
    assert flat["text_output"] == nested["text_output"]
    other = client.generate(url, NAME, {"text_input": PROMPT, **options, "seed": 8})
    assert other["text_output"] != flat["text_output"]
    over_grpc = grpc_stream(
        server.addresses.grpc, text_input=PROMPT.encode(), parameters={"max_tokens": 3}
    )
    assert over_grpc[-1]["completion_tokens"] <= 3


def test_stop_words_chat_and_text_beyond_ascii(server: launch.Server) -> None:
    url = server.addresses.http
    text = client.generate(url, NAME, {"text_input": PROMPT, "max_tokens": 24})["text_output"]
    cut = text[4:6]
    stopped = client.generate(
        url, NAME, {"text_input": PROMPT, "max_tokens": 24, "stop_words": ["never there", cut]}
    )
    assert stopped["text_output"] == text[: text.index(cut)]
    assert stopped["finish_reason"] == "stop"
    chat = {"text_input": "naïve 日本語 👩🏽‍🚀", "chat": True, "max_tokens": 4}
    messages = json.dumps([{"role": "user", "content": "naïve 日本語 👩🏽‍🚀"}])
    assert client.generate(url, NAME, chat) == client.generate(
        url, NAME, {"messages": messages, "max_tokens": 4}
    )


def test_the_request_of_tritons_openai_front_end_is_taken(server: launch.Server) -> None:
    # The names, types and shapes that it sends to every model that is not vLLM's.
    (answer,) = grpc_stream(
        server.addresses.grpc,
        text_input=PROMPT.encode(),
        stream=False,
        max_tokens=5,
        stop_words=[b"never", b"there"],
        top_p=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        seed=3,
        temperature=1.0,
    )
    assert answer["completion_tokens"] <= 5
    assert answer["text_output"]


# -- many -----------------------------------------------------------------------------------------


def test_32_concurrent_streams_equal_their_solo_runs(server: launch.Server) -> None:
    requests = [
        {
            "text_input": f"{PROMPT} {'fox jumps ' * (index % 7)}{index}",
            "max_tokens": 4 + 3 * (index % 5),
            "temperature": 0.0 if index % 2 else 0.8,
            "seed": index,
        }
        for index in range(32)
    ]

    def run(fields: dict[str, Any]) -> str:
        return text_of(list(client.stream(server.addresses.http, NAME, fields)))

    solo = [run(fields) for fields in requests]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(run, requests))
    assert together == solo
    assert len(set(solo)) > 16


def cancelled_over_grpc(server: launch.Server) -> None:
    arrived = threading.Event()
    with grpc_client.InferenceServerClient(server.addresses.grpc) as connection:
        connection.start_stream(lambda result, error: arrived.set())
        connection.async_stream_infer(
            NAME, tensors(text_input=PROMPT.encode(), max_tokens=200, stream=True)
        )
        assert arrived.wait(10)
        connection.stop_stream(cancel_requests=True)


def gone_from_http(server: launch.Server) -> None:
    body = json.dumps({"text_input": PROMPT, "max_tokens": 200, "stream": True}).encode()
    head = (
        f"POST /v2/models/{NAME}/generate_stream HTTP/1.1\r\nHost: x\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.addresses.http_port)) as connection:
        connection.sendall(head.encode() + body)
        assert b"200 OK" in connection.recv(64)


@pytest.mark.parametrize("leave", [cancelled_over_grpc, gone_from_http])
def test_a_client_that_goes_away_frees_its_slot(server: launch.Server, leave: Any) -> None:
    before = metric(server, "nmexport_requests_cancelled_total")
    for _ in range(10):  # the tiny model may be done before a busy machine hears of the client
        leave(server)
        wait_for(lambda: metric(server, "nmexport_running_requests") == 0)
        if metric(server, "nmexport_requests_cancelled_total") > before:
            break
    assert metric(server, "nmexport_requests_cancelled_total") > before


# -- wrong requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_input": ""}, "text_input is empty"),
        ({"max_tokens": 3}, "names no text"),
        ({"text_input": "a", "messages": "[]"}, "names no text"),
        ({"messages": "no json"}, "messages is no JSON"),
        ({"text_input": "a" * 3000}, "Too long"),
        ({"text_input": "a", "max_tokens": 300}, "Too long"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens 0"),
        ({"text_input": "a", "temperature": -0.5}, "temperature -0.5"),
        ({"text_input": "a", "top_p": 1.5}, "top_p 1.5"),
        ({"text_input": "a", "surprise": 1}, "Unknown parameter 'surprise'"),
        ({"text_input": "a", "parameters": {"seed": "x"}}, "Unable to parse"),
        ({"text_input": "a", "max_tokens": "many"}, "Unable to parse"),
        ({"text_input": 3}, "Unable to parse"),
    ],
)
def test_a_wrong_request_is_told_why_and_hurts_nobody(
    server: launch.Server, fields: dict[str, Any], words: str
) -> None:
    url = server.addresses.http
    with pytest.raises(RequestError, match=re.escape(words)):
        client.generate(url, NAME, fields)
    with pytest.raises(RequestError, match=re.escape(words)):
        list(client.stream(url, NAME, fields))
    assert client.generate(url, NAME, {"text_input": PROMPT, "max_tokens": 2})["text_output"]


def test_wrong_type_and_broken_utf8_over_grpc(server: launch.Server) -> None:
    address = server.addresses.grpc
    with pytest.raises(RequestError, match="not UTF-8"):
        grpc_stream(address, text_input=b"\xff\xfe broken")
    wrong = grpc_client.InferInput("text_input", [1, 1], "INT32")
    wrong.set_data_from_numpy(np.array([[1]], dtype=np.int32))
    answers: queue.Queue[Any] = queue.Queue()
    with grpc_client.InferenceServerClient(address) as connection:
        connection.start_stream(lambda result, error: answers.put(error))
        connection.async_stream_infer(NAME, [wrong])
        assert "data-type" in str(answers.get(timeout=10))
    assert text_of(grpc_stream(address, text_input=PROMPT.encode(), max_tokens=2))


# -- beginning and end ----------------------------------------------------------------------------


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir() if "triton" in path.name}


def test_sigterm_lets_streams_end_and_leaves_nothing(
    server: launch.Server, work: Path, tmp_path: Path
) -> None:
    fields = {"text_input": PROMPT, "max_tokens": 150}
    expected = client.generate(server.addresses.http, NAME, fields)["text_output"]
    before = shared_memory()
    # Copied elsewhere: a package knows no path of where it was made.
    moved = shutil.copytree(work / "package" / "current", tmp_path / "moved", symlinks=True)
    with triton(moved / "model_repository", tmp_path / "log") as other:
        assert shared_memory() > before
        responses = client.stream(other.addresses.http, NAME, fields)
        text = next(responses)["text_output"]
        stopping = threading.Thread(target=other.stop)
        stopping.start()
        text += text_of(list(responses))
        stopping.join(30)
        assert other.process.returncode == 0
    assert text == expected
    assert shared_memory() == before


def test_other_logits_than_the_reference_mark_the_model_unready(work: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(work / "package" / "current", tmp_path / "moved", symlinks=True)
    reference = moved / "model_repository" / NAME / "1" / REFERENCE
    logits = np.load(reference)
    np.save(reference, np.roll(logits, 1))
    with (
        pytest.raises(EnvironmentFault, match="before it was ready"),
        triton(moved / "model_repository", tmp_path / "log"),
    ):
        pytest.fail("it is ready")
    assert "does not compute here what it computed" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_stub_that_corrupts_tensors_is_refused(work: Path, tmp_path: Path) -> None:
    if np.lib.NumpyVersion(np.__version__) < "2.0.0" or require_tritonserver().wheel is None:
        pytest.skip("needs NumPy 2 and the wheel's old stub")
    folder = tmp_path / "env"
    make_environment(folder, [path for path in sys.path if path], packages=())
    with (
        pytest.raises(EnvironmentFault, match="before it was ready"),
        triton(work / "package" / "current" / "model_repository", tmp_path / "log", env=folder),
    ):
        pass
    assert "corrupts tensors" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_nmexport_serve_starts_waits_and_stops_at_sigterm(work: Path) -> None:
    from tests.served import addresses

    where = addresses()
    command = [sys.executable, "-m", "nmexport", "serve", str(work), "--json"]
    command += ["--http-port", str(where.http_port), "--grpc-port", str(where.grpc_port)]
    command += ["--metrics-port", str(where.metrics_port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        lines = []
        while not lines or lines[-1] != "}\n":
            lines.append(run.stdout.readline())
            assert lines[-1], run.communicate()
        document = json.loads("".join(lines))
        assert client.text_model(document["http"]) == NAME
        assert document["http"] == where.http
        run.terminate()
        run.communicate(timeout=30)
    assert run.returncode == 0


# -- the raw engine -------------------------------------------------------------------------------

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


@pytest.mark.slow
def test_the_raw_engines_configuration_is_served_as_it_is(work: Path, tmp_path: Path) -> None:
    signature = signature_of(work / "export" / "current" / "model.onnx")
    folder = tmp_path / "repository" / "tiny_engine"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / PLAN).write_bytes(b"a plan")
    config = engine_config("tiny_engine", signature, max_batch_size=4, profiles=2)
    (folder / CONFIG).write_text(to_text(config))
    installation = require_tritonserver()
    backends = launch.backend_folder(installation, tmp_path)
    if backends is None:
        pytest.skip("an installed server has backends of its own")
    (backends / "tensorrt").mkdir()
    (backends / "tensorrt" / "model.py").write_text(STAND_IN)
    with (
        triton(tmp_path / "repository", tmp_path / "log", backends=backends) as server,
        grpc_client.InferenceServerClient(server.addresses.grpc) as connection,
    ):
        served = connection.get_model_config("tiny_engine").config
        assert [one.name for one in served.input] == [one.name for one in signature.inputs]
        assert served.max_batch_size == 4
        for past in (0, 5):
            logits = run_engine(connection, signature, batch=2, tokens=3, past=past)
            assert logits.shape == (2, 3, 384)


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
    result = connection.infer("tiny_engine", inputs)
    assert result.as_numpy("present.1.value").shape[2] == past + tokens
    return result.as_numpy("logits")
