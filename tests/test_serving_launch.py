"""Finding, preparing and watching a tritonserver, with stand-ins; and the client's side."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.errors import ArtifactError, EnvironmentFault, RequestError
from nmexport.serving import client, launch
from nmexport.serving.launch import Addresses, Installation, Server

from tests.served import addresses

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
    installed = Installation(server=tmp_path / "s")
    assert launch.python_environment(installed) == Path(sys.prefix)
    with pytest.raises(EnvironmentFault, match="bin/python3"):
        launch.python_environment(installed, tmp_path)
    assert launch.python_environment(installed, Path(sys.prefix)) == Path(sys.prefix)


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

    monkeypatch.setattr(launch, "make_environment", make)
    wheel = Installation(server=tmp_path / "s", wheel=tmp_path)
    first, second = launch.python_environment(wheel), launch.python_environment(wheel)
    assert first == second
    assert first.is_relative_to(tmp_path)
    assert made == [(launch.NUMPY_1,)]
    monkeypatch.setattr(np, "__version__", "1.26.4")
    assert launch.python_environment(wheel) == Path(sys.prefix)


def test_an_environment_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="--env"):
        launch.make_environment(tmp_path / "env", [], packages=(str(tmp_path / "absent.whl"),))


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
    assert "--exit-timeout-secs=7" in command
    variables = launch.server_environment(installation, tmp_path / "env")
    assert variables["PATH"].startswith(f"{tmp_path}/env/bin:")
    assert variables["LD_LIBRARY_PATH"].startswith(f"{tmp_path}/site/nvidia_pytriton.libs")
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} & set(variables)
    everywhere = Addresses(host="::", http_port=1, grpc_port=2, metrics_port=3)
    assert everywhere.http == "http://127.0.0.1:1"
    assert everywhere.grpc == "127.0.0.1:2"
    assert everywhere.metrics == "http://127.0.0.1:3/metrics"


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
        pytest.raises(EnvironmentFault, match="ended with code 1"),
    ):
        server.wait_ready(20)


def test_a_server_that_is_never_ready_is_told(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    with (
        start(slow, "/models", tmp_path / "log") as server,
        pytest.raises(EnvironmentFault, match="not ready after"),
    ):
        server.wait_ready(0.2)


def test_a_server_that_does_not_stop_is_killed(
    fake_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_KILL_SECONDS", 0.2)
    server = start(fake_server, "/stubborn", tmp_path / "log")
    server.wait_ready(20)
    assert server.stop() == -9


def test_serve_tells_a_server_that_fails(fake_server: Path, tmp_path: Path) -> None:
    (tmp_path / "model_repository").mkdir()
    ports = addresses()
    words = ["serve", str(tmp_path), "--server", str(fake_server)]
    words += ["--http-port", str(ports.http_port), "--drain-seconds", "0"]
    fake_server.write_text("#!/bin/sh\nexit 3\n")
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "ended with code 3" in result.output


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


# -- the client -----------------------------------------------------------------------------------


class FakeTriton(http.server.BaseHTTPRequestHandler):
    """Answers as Triton's HTTP endpoint does; what it was asked is kept."""

    asked: list[tuple[str, Any]]
    models: list[str]
    error: str | None

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
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def triton() -> Iterator[tuple[str, type[FakeTriton]]]:
    handler = type(
        "Handler", (FakeTriton,), {"asked": [], "models": ["m", "m_engine"], "error": None}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
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
        ("<html>", "<html>"),
        ("", "400"),
    ],
)
def test_client_says_what_the_server_said(
    triton: tuple[str, type[FakeTriton]], answer: str, words: str
) -> None:
    url, handler = triton
    handler.error = answer
    with pytest.raises(RequestError, match=words):
        list(client.stream(url, "m", {"text_input": "x"}))


def test_client_tells_an_error_amid_the_stream(triton: tuple[str, type[FakeTriton]]) -> None:
    with pytest.raises(RequestError, match="the model failed"):
        list(client.stream(triton[0], "m", {"text_input": "late error"}))


def test_client_needs_one_model_and_a_server(triton: tuple[str, type[FakeTriton]]) -> None:
    url, handler = triton
    handler.models = ["a", "b"]
    with pytest.raises(RequestError, match="a, b"):
        client.text_model(url)
    with pytest.raises(EnvironmentFault, match="nmexport serve"):
        client.models(f"http://127.0.0.1:{addresses().http_port}")
    with pytest.raises(RequestError, match="no URL"):
        client.models("file:///etc")
