"""The real tritonserver on a tiny model: what clients see, what they may do wrong, how it ends."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from nmexport.errors import EnvironmentFault, RequestError
from nmexport.generation.loop import generate
from nmexport.generation.options import GenerationOptions
from nmexport.serving import client, launch
from nmexport.serving.bundle import REFERENCE
from nmexport.serving.stub_environment import make_environment
from nmexport.serving.triton_config import from_text, to_text

from tests.support.served import (
    NAME,
    require_tritonserver,
    save_work,
    triton,
)
from tests.support.triton_clients import (
    grpc_cancelled,
    grpc_client,
    grpc_stream,
    http_client,
    http_generate,
    metrics_of,
    regions_left,
    regions_of,
    text_of,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path


PROMPT = "The quick brown"
CONTEXT = 4096
LONG = CONTEXT - 16
"""Tokens of a text that takes seconds: the tiny model makes one in well under a millisecond."""


@pytest.fixture(scope="module")
def work(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with an export, an engine and a package."""
    require_tritonserver()
    root = tmp_path_factory.mktemp("served")
    save_work(tiny_export, root, context=CONTEXT)
    return root


@pytest.fixture(scope="module")
def server(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[launch.Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with triton(launch.package_folder(work) / "model_repository", log) as running:
        yield running


def metrics(server: launch.Server) -> dict[str, float]:
    return metrics_of(server, NAME)


def gained(server: launch.Server, before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in metrics(server).items()}


# -- text -----------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_generate(server: launch.Server, work: Path) -> None:
    expected = "".join(generate(work, PROMPT, GenerationOptions(max_tokens=24)))
    assert expected
    fields = {"text_input": PROMPT, "max_tokens": 24}
    whole = client.generate(server.addresses.http, NAME, fields)
    streamed = list(client.stream(server.addresses.http, NAME, fields))
    over_grpc = grpc_stream(
        server.addresses.grpc, NAME, text_input=PROMPT.encode(), max_tokens=24, stream=True
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
    answer = http_generate(server.addresses.http, NAME, {"text_input": PROMPT, "max_tokens": 3})
    assert answer["completion_tokens"] == 3


def test_options_come_as_inputs_or_as_parameters(server: launch.Server) -> None:
    url = server.addresses.http
    options = {"max_tokens": 12, "temperature": 0.9, "seed": 7, "top_k": 20, "top_p": 0.9}
    flat = client.generate(url, NAME, {"text_input": PROMPT, **options})
    nested = client.generate(url, NAME, {"text_input": PROMPT, "parameters": options})
    assert flat["text_output"] == nested["text_output"]
    other = client.generate(url, NAME, {"text_input": PROMPT, **options, "seed": 8})
    assert other["text_output"] != flat["text_output"]
    over_grpc = grpc_stream(
        server.addresses.grpc, NAME, text_input=PROMPT.encode(), parameters={"max_tokens": 3}
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


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_of_tritons_openai_front_end_is_taken(
    server: launch.Server, stream: bool
) -> None:
    # The names, types and shapes that it sends to every model that is not vLLM's.
    answers = grpc_stream(
        server.addresses.grpc,
        NAME,
        text_input=PROMPT.encode(),
        stream=stream,
        max_tokens=5,
        stop_words=[b"never", b"there"],
        top_p=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        seed=3,
        temperature=1.0,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
    )
    # What it makes of the answers: the first one's prompt, and the sum of the outputs.
    assert len(answers) == 1 or stream
    assert answers[0]["num_input_tokens"] == answers[-1]["prompt_tokens"] > 0
    assert sum(answer["num_output_tokens"] for answer in answers) == 5
    assert answers[-1]["completion_tokens"] == 5
    assert text_of(answers)


def test_openai_s_client_sees_the_same_model(server: launch.Server, work: Path) -> None:
    expected = "".join(generate(work, PROMPT, GenerationOptions(max_tokens=24)))
    before = metrics(server)
    with openai.OpenAI(base_url=server.addresses.openai, api_key="none") as asking:
        (model,) = asking.models.list().data
        whole = asking.completions.create(model=model.id, prompt=PROMPT, max_tokens=24)
        chunks = list(
            asking.completions.create(model=model.id, prompt=PROMPT, max_tokens=24, stream=True)
        )
    assert model.id == NAME
    assert whole.choices[0].text == expected
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert gained(server, before)["requests_finished_total"] == 2


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


def cancelled_over_grpc(server: launch.Server) -> int:
    return grpc_cancelled(server.addresses.grpc, NAME, text_input=PROMPT, max_tokens=LONG)


def gone_from_http(server: launch.Server) -> int:
    fields = {"text_input": PROMPT, "max_tokens": LONG, "return_num_output_tokens": True}
    responses = client.stream(server.addresses.http, NAME, fields, timeout=60)
    tokens: int = next(responses)["num_output_tokens"]
    responses.close()
    return tokens


@pytest.mark.parametrize("leave", [cancelled_over_grpc, gone_from_http])
def test_a_client_that_goes_away_frees_its_slot(server: launch.Server, leave: Any) -> None:
    def tokens_for_nobody() -> float:
        before = metrics(server)
        read = leave(server)
        wait_for(lambda: metrics(server)["running_requests"] == 0)
        after = gained(server, before)
        assert after["requests_cancelled_total"] == 1
        assert after["requests_finished_total"] == 0
        assert after["cache_reserved_bytes"] == 0
        return after["generated_tokens_total"] - read

    # Until the server hears of it the model goes on, on a busy machine for longer; after that
    # not one token is made.
    assert any(tokens_for_nobody() <= 2 for _ in range(10))


def test_the_metrics_page_tells_waits_and_tokens(server: launch.Server) -> None:
    before, began = metrics(server), time.monotonic()
    fields = {"text_input": PROMPT, "max_tokens": 20}
    with ThreadPoolExecutor(6) as pool:  # four have slots
        asked = [
            pool.submit(client.generate, server.addresses.http, NAME, {**fields, "seed": seed})
            for seed in range(6)
        ]
        answers = [one.result() for one in asked]
    with pytest.raises(RequestError, match="Unknown parameter"):
        client.generate(server.addresses.http, NAME, {**fields, "surprise": 1})
    took_ms = (time.monotonic() - began) * 1e3
    after = gained(server, before)
    assert after["requests_finished_total"] == 6
    assert after["requests_rejected_total"] == 1
    assert after["requests_cancelled_total"] == after["requests_failed_total"] == 0
    assert after["prompt_tokens_total"] == sum(one["prompt_tokens"] for one in answers)
    assert after["generated_tokens_total"] == 6 * 20
    counts = {"queue_time_ms": 6, "time_to_first_token_ms": 6, "inter_token_latency_ms": 6 * 19}
    for name, count in counts.items():
        assert after[f"{name}_count"] == count
        assert 0 < after[f"{name}_sum"] < 6 * took_ms
    # A request waits for a slot, then for its first token, then between the others.
    assert after["queue_time_ms_sum"] < after["time_to_first_token_ms_sum"]
    for name in ("running_requests", "waiting_requests", "cache_reserved_bytes"):
        assert metrics(server)[name] == 0


# -- wrong requests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_input": ""}, "text_input is empty"),
        ({"max_tokens": 3}, "names no text"),
        ({"text_input": "a", "messages": "[]"}, "names no text"),
        ({"messages": "no json"}, "messages is no JSON"),
        ({"messages": "[" * 200_000}, "messages is nested too deeply"),
        ({"text_input": "a" * 5000}, "Too long: 5000 prompt tokens"),
        ({"text_input": "a" * 1_000_000}, "Too long: text_input has 1000000 bytes"),
        ({"text_input": "a", "max_tokens": 5000}, "Too long"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens 0"),
        ({"text_input": "a", "temperature": -0.5}, "temperature -0.5"),
        ({"text_input": "a", "temperature": 1e-30}, "temperature 1.0000000031710769e-30"),
        ({"text_input": "a", "presence_penalty": -1e30}, "presence_penalty"),
        ({"text_input": "a", "repetition_penalty": 1e-44}, "repetition_penalty"),
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


def test_a_full_queue_is_503_and_the_server_takes_requests_again(
    work: Path, tmp_path: Path
) -> None:
    """Clients try these again, and nothing else."""
    repository = tmp_path / "model_repository"
    shutil.copytree(launch.package_folder(work) / "model_repository", repository)
    path = repository / NAME / "config.pbtxt"
    config = from_text(path.read_text("utf-8"))
    config.parameters["slots"].string_value = "1"
    config.parameters["queue"].string_value = "1"
    config.dynamic_batching.default_queue_policy.max_queue_size = 1
    path.write_text(to_text(config), "utf-8")
    long = {"text_input": PROMPT, "max_tokens": LONG // 2}
    with triton(repository, tmp_path / "server.log") as server, ThreadPoolExecutor(24) as pool:
        url = f"{server.addresses.http}/v2/models/{NAME}"
        ways: tuple[Callable[[], int], ...] = (
            lambda: http_status(f"{url}/generate", long),
            lambda: http_status(f"{url}/generate_stream", long),
            lambda: grpc_status(server.addresses.grpc, long),
        )
        # One text is written, one waits in the model, one or two in Triton: whoever comes after
        # them is refused. A text that ends meanwhile lets one more in, so each way asks until then.
        waiting: list[Future[int]] = []
        for way in ways:
            asked: list[Future[int]] = []
            until = time.monotonic() + 60
            while not any(one.done() and one.result() == 503 for one in asked):
                assert time.monotonic() < until, "nobody was refused"
                asked.append(pool.submit(way))
                wait(asked[-1:], timeout=0.1)
            waiting += asked
        assert {one.result() for one in waiting} == {200, 503}
        short = {**long, "max_tokens": 2}
        assert client.generate(server.addresses.http, NAME, short)["text_output"]


def http_status(url: str, fields: dict[str, Any]) -> int:
    try:
        with urllib.request.urlopen(url, json.dumps(fields).encode(), timeout=300) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def grpc_status(address: str, fields: dict[str, Any]) -> int:
    """As HTTP would say it."""
    try:
        grpc_stream(address, NAME, **fields)
    except RequestError as error:
        if "Exceeds maximum queue size" not in str(error):
            raise
        return 503
    return 200


def test_wrong_type_and_broken_utf8_over_grpc(server: launch.Server) -> None:
    address = server.addresses.grpc
    with pytest.raises(RequestError, match="not UTF-8"):
        grpc_stream(address, NAME, text_input=b"\xff\xfe broken")
    wrong = grpc_client.InferInput("text_input", [1, 1], "INT32")
    wrong.set_data_from_numpy(np.array([[1]], dtype=np.int32))
    answers: queue.Queue[Any] = queue.Queue()
    with grpc_client.InferenceServerClient(address) as connection:
        connection.start_stream(lambda result, error: answers.put(error))
        connection.async_stream_infer(NAME, [wrong])
        assert "data-type" in str(answers.get(timeout=10))
    assert text_of(grpc_stream(address, NAME, text_input=PROMPT.encode(), max_tokens=2))


# -- beginning and end ----------------------------------------------------------------------------


def test_sigterm_lets_streams_end_and_leaves_nothing(
    server: launch.Server, work: Path, tmp_path: Path
) -> None:
    fields = {"text_input": PROMPT, "max_tokens": 150}
    expected = client.generate(server.addresses.http, NAME, fields)["text_output"]
    # Copied elsewhere: a package knows no path of where it was made.
    moved = shutil.copytree(work / "package" / "current", tmp_path / "moved", symlinks=True)
    with triton(moved / "model_repository", tmp_path / "log") as other:
        regions = regions_of(other)
        assert regions_left(regions) == regions != set()
        responses = client.stream(other.addresses.http, NAME, fields)
        text = next(responses)["text_output"]
        stopping = threading.Thread(target=other.stop)
        stopping.start()
        text += text_of(list(responses))
        stopping.join(30)
        assert other.process.returncode == 0
    assert text == expected
    assert regions_left(regions) == set()


def test_sigterm_lets_streams_of_openai_s_api_end(
    server: launch.Server, work: Path, tmp_path: Path
) -> None:
    fields: Any = {"model": NAME, "prompt": PROMPT, "max_tokens": 150}
    with openai.OpenAI(base_url=server.addresses.openai, api_key="none") as asking:
        expected = asking.completions.create(**fields).choices[0].text
    # Triton knows nothing of these requests: the model itself waits for their end.
    with (
        triton(launch.package_folder(work) / "model_repository", tmp_path / "log") as other,
        openai.OpenAI(base_url=other.addresses.openai, api_key="none", max_retries=0) as asking,
    ):
        chunks = asking.completions.create(**fields, stream=True)
        text = next(chunks).choices[0].text
        stopping = threading.Thread(target=other.stop)
        stopping.start()
        text += "".join(chunk.choices[0].text for chunk in chunks)
        stopping.join(30)
        assert other.process.returncode == 0
        with pytest.raises(openai.APIConnectionError):
            asking.completions.create(**fields)
    assert text == expected


def test_what_outlasts_the_draining_is_told_so_and_leaves_nothing(
    work: Path, tmp_path: Path
) -> None:
    repository = launch.package_folder(work) / "model_repository"
    with (
        triton(repository, tmp_path / "log", drain_seconds=1) as server,
        ThreadPoolExecutor(9) as pool,
    ):
        # Four at a time, seconds each: some run and some wait when it is told to stop.
        over_http = [
            client.stream(
                server.addresses.http, NAME, {"text_input": PROMPT, "max_tokens": LONG}, timeout=60
            )
            for _ in range(4)
        ]
        for responses in over_http:
            next(responses)
        told = [pool.submit(list, responses) for responses in over_http]
        told += [
            pool.submit(
                grpc_stream,
                server.addresses.grpc,
                NAME,
                text_input=PROMPT.encode(),
                max_tokens=LONG,
                stream=True,
            )
            for _ in range(4)
        ]
        wait_for(lambda: metrics(server)["waiting_requests"] == 4)
        regions = regions_of(server)
        assert server.stop() == 0
        for one in told:
            with pytest.raises(RequestError, match="shutting down"):
                one.result(30)
    assert regions
    assert regions_left(regions) == set()


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
    from tests.support.served import addresses

    where = addresses()
    command = [sys.executable, "-m", "nmexport", "serve", str(work), "--json"]
    command += ["--http-port", str(where.http_port), "--grpc-port", str(where.grpc_port)]
    command += ["--metrics-port", str(where.metrics_port)]
    command += ["--openai-port", str(where.openai_port)]
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
        assert launch.serves_openai(document["openai"])
        run.terminate()
        run.communicate(timeout=30)
    assert run.returncode == 0
