"""Finding, preparing and watching a tritonserver, with stand-ins; and the client's side."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.errors import ArtifactError, EnvironmentFault, RequestError
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.serving import client, launch, stub_environment
from nmexport.serving.addresses import Addresses
from nmexport.serving.launch import Installation, Server
from nmexport.serving.openai import opening
from nmexport.serving.server_output import ServerOutput
from nmexport.serving.stub_environment import python_environment

from tests.support.served import addresses

if TYPE_CHECKING:
    from collections.abc import Iterator

# Takes tritonserver's flags; answers as a ready server, or ends as one that cannot start.
FAKE_SERVER = """#!{python}
import http.server, signal, sys
flags = dict(one[2:].split("=", 1) for one in sys.argv[1:] if "=" in one)
print(*sys.argv[1:], flush=True)
if flags["model-repository"].endswith("broken"):
    sys.exit("no model can be loaded")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *words): pass
def stop(number, frame):
    if not flags["model-repository"].endswith("stubborn"):
        sys.exit(0)
signal.signal(signal.SIGTERM, stop)
http.server.HTTPServer((flags["http-address"], int(flags["http-port"])), Handler).serve_forever()
"""


@pytest.fixture
def fake_server(tmp_path: Path) -> Path:
    path = tmp_path / "tritonserver"
    path.write_text(FAKE_SERVER.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without any tritonserver."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(launch, "_CONTAINER", tmp_path / "absent")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


# -- finding --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nowhere")
def test_no_server_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"pip install.*nvidia-pytriton"):
        launch.find_server()
    with pytest.raises(EnvironmentFault, match="no tritonserver"):
        launch.find_server(tmp_path / "none")


@pytest.mark.usefixtures("nowhere")
def test_servers_are_looked_for_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_server: Path
) -> None:
    wheel = tmp_path / "site" / "pytriton"
    server = wheel / "tritonserver" / "bin" / "tritonserver"
    server.parent.mkdir(parents=True)
    server.touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(wheel)]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert launch.find_server() == Installation(server=server, wheel=wheel)
    monkeypatch.setattr(launch, "_CONTAINER", fake_server)
    assert launch.find_server() == Installation(server=fake_server)
    monkeypatch.setattr("shutil.which", lambda name: "/opt/bin/tritonserver")
    assert launch.find_server().server == Path("/opt/bin/tritonserver")
    assert launch.find_server(server).wheel is None
    (tmp_path / "site" / "nvidia_pytriton.libs").mkdir()
    assert launch.find_server(server).wheel == wheel


def test_a_package_is_found_in_a_work_directory_and_by_itself(tmp_path: Path) -> None:
    package = tmp_path / "work" / "package" / "current"
    (package / "model_repository").mkdir(parents=True)
    assert launch.package_folder(tmp_path / "work") == package
    assert launch.package_folder(package) == package
    with pytest.raises(ArtifactError, match="nmexport package"):
        launch.package_folder(tmp_path)
    (package / "plugins").mkdir()
    (package / "plugins" / "a.so").touch()
    assert launch.plugins_of(package) == [package / "plugins" / "a.so"]


# -- preparing ------------------------------------------------------------------------------------


def test_a_wheels_backend_is_laid_out(tmp_path: Path) -> None:
    wheel = tmp_path / "pytriton"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = wheel / "tritonserver" / "python_backend_stubs"
    backend = wheel / "tritonserver" / "backends" / "python"
    backend.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        (backend / name).write_text(name)
    installation = Installation(server=tmp_path / "s", wheel=wheel)
    (stubs / "2.7").mkdir(parents=True)
    with pytest.raises(EnvironmentFault, match=f"Python {version}"):
        launch.backend_folder(installation, tmp_path / "scratch")
    (stubs / version).mkdir()
    (stubs / version / "triton_python_backend_stub").touch()
    made = launch.backend_folder(installation, tmp_path / "scratch")
    assert made is not None
    assert {path.name for path in (made / "python").iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_utils.py",
        "triton_python_backend_stub",
    }
    assert launch.backend_folder(Installation(server=tmp_path / "s"), tmp_path) is None


def test_environment_is_the_named_one_or_this_one(tmp_path: Path) -> None:
    assert python_environment(old_stub=False) == Path(sys.prefix)
    with pytest.raises(EnvironmentFault, match="bin/python3"):
        python_environment(tmp_path, old_stub=False)
    assert python_environment(Path(sys.prefix), old_stub=True) == Path(sys.prefix)


def test_an_old_stub_gets_an_environment_with_numpy_1_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    made: list[Any] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(np, "__version__", "2.4.0")

    def make(folder: Path, seen: Any, *, packages: Any) -> None:
        made.append(packages)
        folder.mkdir()

    monkeypatch.setattr(stub_environment, "make_environment", make)
    first, second = python_environment(old_stub=True), python_environment(old_stub=True)
    assert first == second
    assert first.is_relative_to(tmp_path)
    assert made == [(stub_environment.NUMPY_1,)]
    monkeypatch.setattr(np, "__version__", "1.26.4")
    assert python_environment(old_stub=True) == Path(sys.prefix)


def test_an_environment_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="--env"):
        stub_environment.make_environment(
            tmp_path / "env", [], packages=(str(tmp_path / "absent.whl"),)
        )


def test_a_server_hears_nobody_else_unless_asked(tmp_path: Path) -> None:
    installation = Installation(server=tmp_path / "s", wheel=tmp_path / "site" / "pytriton")
    command = launch.server_command(
        installation,
        tmp_path / "models",
        Addresses(),
        backends=tmp_path / "b",
        drain_seconds=7,
        plugins=[tmp_path / "a.so", tmp_path / "b.so"],
    )
    for kind in ("http", "grpc", "metrics"):
        assert f"--{kind}-address=127.0.0.1" in command
    assert f"--backend-config=tensorrt,plugins={tmp_path}/a.so;{tmp_path}/b.so" in command
    assert "--exit-timeout-secs=12" in command
    variables = launch.server_environment(installation, tmp_path / "env")
    assert variables["PATH"].startswith(f"{tmp_path}/env/bin:")
    assert variables["LD_LIBRARY_PATH"].startswith(f"{tmp_path}/site/nvidia_pytriton.libs")
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} & set(variables)
    everywhere = Addresses(host="::", http_port=1, grpc_port=2, metrics_port=3)
    assert everywhere.http == "http://127.0.0.1:1"
    assert everywhere.grpc == "127.0.0.1:2"
    assert everywhere.metrics == "http://127.0.0.1:3/metrics"
    assert everywhere.openai == "http://127.0.0.1:9000/v1"
    assert everywhere.openai_listener == ":::9000"
    without = replace(everywhere, openai_port=0)
    assert (without.openai, without.openai_listener) == (None, "")


# -- watching -------------------------------------------------------------------------------------


def start(server: Path, repository: str, log: Path) -> Server:
    with log.open("wb") as output:
        return Server.start(
            Path(repository),
            installation=Installation(server=server),
            addresses=addresses(),
            output=output,
            drain_seconds=0,
        )


def test_a_server_is_waited_for_and_stopped(fake_server: Path, tmp_path: Path) -> None:
    with start(fake_server, "/models", tmp_path / "log") as server:
        assert server.wait_ready(20) > 0
        assert launch.is_ready(server.addresses.http)
    assert server.process.returncode == 0
    assert not launch.is_ready(server.addresses.http)
    assert "--model-repository=/models" in (tmp_path / "log").read_text()


def test_a_server_that_ends_early_is_told(fake_server: Path, tmp_path: Path) -> None:
    with (
        start(fake_server, "/broken", tmp_path / "log") as server,
        pytest.raises(EnvironmentFault, match="ended with code 1") as caught,
    ):
        server.wait_ready(20)
    assert "  no model can be loaded" in str(caught.value)


def test_a_server_that_is_never_ready_is_told(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho loading\nexec sleep 60\n")
    slow.chmod(0o755)
    with start(slow, "/models", tmp_path / "log") as server:
        while "loading" not in server.output.last_lines():
            time.sleep(0.01)
        told = r"not ready after 0\.2 s\..*\n  loading\n.*--ready-seconds"
        with pytest.raises(EnvironmentFault, match=told):
            server.wait_ready(0.2)


@contextlib.contextmanager
def occupied() -> Iterator[int]:
    """A port of 127.0.0.1 with a listener that greets as no HTTP server does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1024)
                        connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("name", ["http", "grpc", "metrics", "openai"])
def test_a_taken_port_is_named_before_the_start(tmp_path: Path, name: str) -> None:
    with occupied() as port:
        where = replace(addresses(), **{f"{name}_port": port})
        with pytest.raises(EnvironmentFault, match=rf"{port}: .*\n.*--{name}-port"):
            Server.start(
                tmp_path, installation=Installation(server=tmp_path / "none"), addresses=where
            )


def test_ports_must_differ_and_hosts_exist() -> None:
    with pytest.raises(EnvironmentFault, match="one port twice"):
        Addresses(http_port=5, grpc_port=5).require_free()
    with pytest.raises(EnvironmentFault, match=r"cannot listen on 203\.0\.113\.1 port"):
        replace(addresses(), host="203.0.113.1").require_free()


def test_a_listener_that_speaks_no_http_is_not_ready() -> None:
    with occupied() as port:
        assert not launch.is_ready(f"http://127.0.0.1:{port}")


def test_a_server_that_ended_is_not_ready_whoever_answers(
    fake_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_ready", lambda _: True)
    with start(fake_server, "/broken", tmp_path / "log") as server:
        server.process.wait(20)
        with pytest.raises(EnvironmentFault, match="ended with code 1"):
            server.wait_ready(20)


def test_what_a_server_prints_outlives_its_reader(tmp_path: Path) -> None:
    for reader in ("kept", "gone"):
        back, front = os.pipe()
        target_back, target_front = os.pipe()
        output = ServerOutput(os.fdopen(back, "rb"), target_front)
        os.close(target_front)
        if reader == "gone":
            os.close(target_back)
        os.write(front, b"".join(b"line %d\n" % index for index in range(30)))
        os.close(front)
        output.finish()
        assert output.last_lines().splitlines()[-1] == "  line 29"
        assert len(output.last_lines().splitlines()) < 30
        if reader == "kept":
            with os.fdopen(target_back, "rb") as passed_on:
                assert passed_on.read().count(b"\n") == 30


def test_a_server_without_tensorrt_serves_the_text_alone(
    fake_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("m", "m_engine"):
        folder = tmp_path / "model_repository" / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").touch()
    (tmp_path / "model_repository" / "m_engine" / "1" / "model.plan").touch()
    models = launch.models_of(tmp_path / "model_repository")
    assert models == {"m": False, "m_engine": True}
    bare = Installation(server=fake_server)
    assert launch.why_no_plans(bare) == "this tritonserver has no TensorRT backend"
    whole = Installation(server=tmp_path / "bin" / "tritonserver")
    (tmp_path / "backends" / "tensorrt").mkdir(parents=True)
    monkeypatch.setattr(tensorrt_library, "gpu_is_usable", lambda: False)
    assert "no NVIDIA GPU" in str(launch.why_no_plans(whole))
    monkeypatch.setattr(tensorrt_library, "gpu_is_usable", lambda: True)
    assert launch.why_no_plans(whole) is None
    # The fake ends at once and prints its flags, which come back as its last words.
    fake_server.write_text('#!/bin/sh\necho "$@"\nexit 3\n')
    result = CliRunner().invoke(cli, serve_words(tmp_path, fake_server))
    assert result.exit_code == 1
    assert "m_engine is not served: this tritonserver has no TensorRT backend" in result.stderr
    assert "--model-control-mode=explicit --load-model=m\n" in result.stderr
    (tmp_path / "model_repository" / "m_engine" / "config.pbtxt").unlink()
    result = CliRunner().invoke(cli, serve_words(tmp_path, fake_server))
    assert "explicit" not in result.stderr


def serve_words(folder: Path, server: Path) -> list[str]:
    """The command line of `nmexport serve` on ports that are free."""
    where = addresses()
    words = ["serve", str(folder), "--server", str(server), "--drain-seconds", "0"]
    words += ["--http-port", str(where.http_port), "--grpc-port", str(where.grpc_port)]
    return [*words, "--metrics-port", str(where.metrics_port)]


def test_a_server_that_does_not_stop_is_killed(
    fake_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_KILL_SECONDS", 0.2)
    server = start(fake_server, "/stubborn", tmp_path / "log")
    server.wait_ready(20)
    assert server.stop() == -9


def test_serve_tells_a_server_that_fails(fake_server: Path, tmp_path: Path) -> None:
    (tmp_path / "model_repository").mkdir()
    fake_server.write_text("#!/bin/sh\necho no model can be loaded\nexit 3\n")
    result = CliRunner().invoke(cli, serve_words(tmp_path, fake_server))
    assert result.exit_code == 1
    assert "ended with code 3" in result.output
    assert "\n  no model can be loaded\n" in result.output


def test_serve_waits_as_long_as_it_is_told(fake_server: Path, tmp_path: Path) -> None:
    (tmp_path / "model_repository").mkdir()
    fake_server.write_text("#!/bin/sh\nexec sleep 60\n")
    words = [*serve_words(tmp_path, fake_server), "--ready-seconds", "1"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "not ready after 1 s" in result.output


def test_doctor_names_the_server(
    monkeypatch: pytest.MonkeyPatch, fake_server: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "_CONTAINER", fake_server)
    monkeypatch.setattr(launch.shutil, "which", lambda name, **more: None)
    document = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert document["tritonserver"] == str(fake_server)
    monkeypatch.setattr(launch, "_CONTAINER", tmp_path / "absent")
    monkeypatch.setattr(launch, "_WHEEL", "no_such_package")
    shown = CliRunner().invoke(cli, ["doctor"]).stdout
    assert "none: pip install" in shown


@pytest.mark.parametrize(("is_here", "says"), [(True, "served by"), (False, "nmexport[serve]")])
def test_doctor_tells_whether_openai_s_api_is_served(
    monkeypatch: pytest.MonkeyPatch, says: str, *, is_here: bool
) -> None:
    monkeypatch.setattr(opening, "is_installed", lambda: is_here)
    assert json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["openai_api"] == is_here
    assert says in CliRunner().invoke(cli, ["doctor"]).stdout


# -- the client -----------------------------------------------------------------------------------


class FakeTriton(http.server.BaseHTTPRequestHandler):
    """Answers as Triton's HTTP endpoint does; what it was asked is kept."""

    asked: list[tuple[str, Any]]
    models: list[str]
    error: str | None
    cut: int | None
    """Bytes of an answer after which the server is gone."""
    chunked: bool

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.path == "/v2/repository/index":
            self.answer(200, json.dumps([{"name": name} for name in self.models]))
        elif self.error is not None:
            self.answer(400, self.error)
        elif self.path.endswith("/generate"):
            self.answer(200, json.dumps({"text_output": "whole"}))
        else:
            events = [
                {"text_output": "one "},
                {"text_output": "two", "finish_reason": "stop", "prompt_tokens": 3},
            ]
            if body["text_input"] == "late error":
                events.append({"error": "the model failed"})
            self.answer(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events))

    def answer(self, code: int, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif self.cut is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.chunked:  # as Triton does: one event a chunk, and none of length 0 once it is gone
            body = b"%x\r\n%b\r\n" % (self.cut or len(body), body[: self.cut])
        self.wfile.write(body if self.chunked else body[: self.cut])
        self.close_connection = True

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def triton() -> Iterator[tuple[str, type[FakeTriton]]]:
    state = {"asked": [], "models": ["m", "m_engine"], "error": None, "cut": None, "chunked": False}
    handler = type("Handler", (FakeTriton,), {**state, "protocol_version": "HTTP/1.1"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_client_streams_and_passes_what_was_asked(triton: tuple[str, type[FakeTriton]]) -> None:
    url, handler = triton
    words = ["client", "--url", f"{url}/", "--top-k", "4", "--stop", "x", "--chat", "hi"]
    shown = CliRunner().invoke(cli, words)
    assert shown.stdout == "one two\n"
    path, body = handler.asked[-1]
    assert path == "/v2/models/m/generate_stream"
    assert body == {
        "text_input": "hi",
        "max_tokens": 128,
        "top_k": 4,
        "chat": True,
        "stop_words": ["x"],
        "stream": True,
    }
    document = json.loads(CliRunner().invoke(cli, [*words, "--json", "--name", "other"]).stdout)
    assert document["text"] == "one two"
    assert document["finish_reason"] == "stop"
    assert handler.asked[-1][0] == "/v2/models/other/generate_stream"
    assert client.generate(url, "m", {"text_input": "x"}) == {"text_output": "whole"}
    piped = CliRunner().invoke(cli, ["client", "--url", url], input="from a pipe")
    assert piped.exit_code == 0
    assert handler.asked[-1][1]["text_input"] == "from a pipe"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ('{"error": "too long"}', "too long"),
        ('data: {"error": "too long"}\n\n', "too long"),
    ],
)
def test_client_says_what_the_server_said(
    triton: tuple[str, type[FakeTriton]], answer: str, words: str
) -> None:
    url, handler = triton
    handler.error = answer
    with pytest.raises(RequestError, match=words):
        list(client.stream(url, "m", {"text_input": "x"}))


@pytest.mark.parametrize("answer", ["<html>not found</html>", "", "{}", "[1]"])
def test_client_tells_a_web_server_from_triton(
    triton: tuple[str, type[FakeTriton]], answer: str
) -> None:
    url, handler = triton
    handler.error = answer
    with pytest.raises(EnvironmentFault, match=f"{url} is no Triton HTTP port.*HTTP 400"):
        list(client.stream(url, "m", {"text_input": "x"}))


def test_client_tells_another_page_from_a_stream(
    triton: tuple[str, type[FakeTriton]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = triton

    def write(self: FakeTriton, code: int, text: str) -> None:
        FakeTriton.answer(self, 200, "<html>\n<p>welcome</p>\n</html>\n")

    monkeypatch.setattr(handler, "answer", write)
    with pytest.raises(EnvironmentFault, match="no stream of events"):
        list(client.stream(url, "m", {"text_input": "x"}))


def test_client_tells_the_grpc_port() -> None:
    """What a gRPC server says first: a settings frame of HTTP/2."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x7f\xff\n")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = CliRunner().invoke(cli, ["client", "--url", url, "hi"])
        thread.join()
    assert result.exit_code == 1
    assert f"{url} is no Triton HTTP port" in result.stderr
    assert "gRPC" in result.stderr
    assert "\\x" not in result.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://[bad", "ftp://a", "http://a b/"])
def test_client_refuses_what_is_no_url(url: str) -> None:
    result = CliRunner().invoke(cli, ["client", "--url", url, "hi"])
    assert result.exit_code == 1
    assert "is no URL of a server" in result.stderr


def test_client_tells_an_error_amid_the_stream(triton: tuple[str, type[FakeTriton]]) -> None:
    with pytest.raises(RequestError, match="the model failed"):
        list(client.stream(triton[0], "m", {"text_input": "late error"}))


FIRST_EVENT = len('data: {"text_output": "one "}\n\n')


@pytest.mark.parametrize(
    ("chunked", "cut"),
    [(False, 5), (False, FIRST_EVENT), (True, FIRST_EVENT), (True, 5)],
    ids=["amid an event", "between events", "between chunks", "amid a chunk"],
)
def test_client_tells_an_answer_that_was_cut_off(
    triton: tuple[str, type[FakeTriton]], cut: int, *, chunked: bool
) -> None:
    url, handler = triton
    handler.cut, handler.chunked = cut, chunked
    words = ["client", "--url", url, "--name", "m", "hi"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert result.stdout == ("one \n" if cut == FIRST_EVENT else "")
    assert "went away before the answer was complete" in result.stderr
    assert "Traceback" not in result.stderr
    document = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert "went away" in document["error"]["problem"]
    if not chunked and cut < FIRST_EVENT:
        with pytest.raises(EnvironmentFault, match="went away"):
            client.generate(url, "m", {"text_input": "x"})


@pytest.mark.parametrize("answer", ["<html>", "[3]", '{"a": 1}', "\udcff"])
def test_client_tells_what_is_not_triton(
    triton: tuple[str, type[FakeTriton]], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    url, handler = triton

    def write(self: FakeTriton, code: int, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode("utf-8", "surrogateescape"))
        self.close_connection = True

    monkeypatch.setattr(handler, "answer", write)
    with pytest.raises(EnvironmentFault, match="is no Triton HTTP port"):
        client.models(url)
    result = CliRunner().invoke(cli, ["client", "--url", url, "hi"])
    assert (result.exit_code, result.stdout) == (1, "")


def test_client_tells_a_model_without_text_and_a_listener_without_http(
    triton: tuple[str, type[FakeTriton]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = triton

    def write(self: FakeTriton, code: int, text: str) -> None:
        FakeTriton.answer(self, 200, 'data: {"logits": [0.5]}\n\n')

    monkeypatch.setattr(handler, "answer", write)
    with pytest.raises(RequestError, match="no text_output"):
        list(client.stream(url, "m_engine", {"text_input": "x"}))
    with occupied() as port, pytest.raises(EnvironmentFault, match="is no Triton HTTP port"):
        client.models(f"http://127.0.0.1:{port}")


def test_client_needs_one_model_and_a_server(triton: tuple[str, type[FakeTriton]]) -> None:
    url, handler = triton
    handler.models = ["a", "b"]
    with pytest.raises(RequestError, match="a, b"):
        client.text_model(url)
    with pytest.raises(EnvironmentFault, match="nmexport serve"):
        client.models(f"http://127.0.0.1:{addresses().http_port}")
    with pytest.raises(RequestError, match="no URL"):
        client.models("file:///etc")
