"""What lies beside a repository: the launch script, run by a real shell; README and notices."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from nmexport.bench.context import check_context
from nmexport.errors import RecipeError
from nmexport.models.source import licence_files
from nmexport.serving import repository
from nmexport.serving.openai.opening import ADDRESS_VARIABLE

from tests.support.served import engine_of, tensorrt_document, text_model

if TYPE_CHECKING:
    from pathlib import Path

# Prints what it is given, one a line, and which it is.
PRINTS = '#!/bin/sh\necho "{name}"\nprintf "%s\\n" "$@"\n'


def program(path: Path, text: str = PRINTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("{name}", path.name))
    path.chmod(0o755)
    return path


def words(export: Path, output: Path, **options: object) -> Path:
    """A package's words, in a folder that a shell has to quote."""
    output.mkdir(parents=True)
    target = {}
    if "engine" in options:
        target = tensorrt_document(target="tensorrt", version="10.14")
    source = text_model(export, engine=engine_of(export, **target))
    repository.write_words(output, source=source, **options)
    return output


def launch(package: Path, *options: str, path: Path, **variables: str) -> list[str]:
    """Lines that launch.sh and what it starts print."""
    done = subprocess.run(
        [package / "launch.sh", *options],
        env={"PATH": f"{path}:/usr/bin:/bin", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return [*done.stdout.splitlines(), f"ended with {done.returncode}"]


def test_every_plugin_is_named_and_none_is_run(tiny_export: Path, tmp_path: Path) -> None:
    package = words(
        tiny_export, tmp_path / "a b;c", engine="tiny_engine", plugins=["plugins/a.so", "b.so"]
    )
    server = program(tmp_path / "triton" / "bin" / "tritonserver")
    (tmp_path / "triton" / "backends" / "tensorrt").mkdir(parents=True)
    gpu = program(tmp_path / "path" / "nvidia-smi")
    shown = launch(package, path=gpu.parent, TRITONSERVER=str(server))
    assert f"--backend-config=tensorrt,plugins={package}/plugins/a.so;{package}/b.so" in shown
    assert shown[-1] == "ended with 0"
    assert not [line for line in shown if "explicit" in line or "launch.sh" in line]


@pytest.mark.parametrize("lacking", ["gpu", "backend"])
def test_without_gpu_or_backend_the_text_is_served_alone(
    tiny_export: Path, tmp_path: Path, lacking: str
) -> None:
    package = words(tiny_export, tmp_path / "p", engine="tiny_engine", plugins=["a.so"])
    server = program(tmp_path / "triton" / "bin" / "tritonserver")
    if lacking == "gpu":
        (tmp_path / "triton" / "backends" / "tensorrt").mkdir(parents=True)
        program(tmp_path / "path" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    else:
        program(tmp_path / "path" / "nvidia-smi")
    shown = launch(package, "--log-verbose=1", path=tmp_path / "path", TRITONSERVER=str(server))
    assert shown[0].startswith("launch.sh: tiny_engine is not served")
    assert {"--model-control-mode=explicit", "--load-model=tiny", "--log-verbose=1"} <= set(shown)
    assert not [line for line in shown if "backend-config" in line]


def test_a_plan_with_its_plugin_inside_needs_no_flag(tiny_export: Path, tmp_path: Path) -> None:
    package = words(tiny_export, tmp_path / "p", engine="tiny_engine")
    server = program(tmp_path / "triton" / "bin" / "tritonserver")
    (tmp_path / "triton" / "backends" / "tensorrt").mkdir(parents=True)
    gpu = program(tmp_path / "path" / "nvidia-smi")
    shown = launch(package, path=gpu.parent, TRITONSERVER=str(server))
    assert not [line for line in shown if "backend-config" in line or "explicit" in line]
    assert shown[-1] == "ended with 0"


def test_it_listens_where_it_is_told_and_nowhere_else(tiny_export: Path, tmp_path: Path) -> None:
    package = words(tiny_export, tmp_path / "a b")
    server = program(tmp_path / "path" / "tritonserver")
    shown = launch(package, "--http-port=1", path=server.parent)
    assert shown[0] == "tritonserver"
    assert f"--model-repository={package}/model_repository" in shown
    addresses = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
    assert set(addresses) <= set(shown)
    assert shown[-2:] == ["--http-port=1", "ended with 0"]
    everywhere = launch(package, path=server.parent, BIND="0.0.0.0")  # noqa: S104  what is tested
    assert "--grpc-address=0.0.0.0" in everywhere


@pytest.mark.parametrize(("asked", "told"), [(None, "::1:9000"), ("81", "::1:81"), ("0", "")])
def test_the_model_is_told_where_openai_s_api_is(
    tiny_export: Path, tmp_path: Path, asked: str | None, told: str
) -> None:
    package = words(tiny_export, tmp_path / "p")
    server = program(tmp_path / "tritonserver", f'#!/bin/sh\necho "told ${ADDRESS_VARIABLE}"\n')
    variables = {} if asked is None else {"OPENAI_PORT": asked}
    shown = launch(package, path=tmp_path, TRITONSERVER=str(server), BIND="::1", **variables)
    assert shown == [f"told {told}", "ended with 0"]


def test_the_wheels_server_is_started_by_nmexport(tiny_export: Path, tmp_path: Path) -> None:
    package = words(tiny_export, tmp_path / "a b")
    ours = program(tmp_path / "env" / "bin" / "nmexport")
    alone = launch(package, "--http-port=1", path=tmp_path, PYTHON_ENV=str(ours.parent.parent))
    serve = ["nmexport", "serve", str(package), "--host"]
    openai = ["--openai-port", "9000"]
    assert alone == [*serve, "127.0.0.1", *openai, "--http-port=1", "ended with 0"]
    server = program(tmp_path / "pytriton" / "tritonserver" / "bin" / "tritonserver")
    (server.parent.parent / "python_backend_stubs").mkdir()
    asked = {"TRITONSERVER": str(server), "BIND": "::1", "OPENAI_PORT": "0"}
    shown = launch(package, path=ours.parent, **asked)
    assert shown == [*serve, "::1", "--server", str(server), "--openai-port", "0", "ended with 0"]


def test_no_server_is_told(tiny_export: Path, tmp_path: Path) -> None:
    package = words(tiny_export, tmp_path / "p")
    program(tmp_path / "path" / "nmexport")
    missing = launch(package, path=tmp_path / "path", TRITONSERVER=str(tmp_path / "none"))
    assert missing == [
        f"launch.sh: there is no tritonserver at {tmp_path}/none; name one with TRITONSERVER",
        "ended with 1",
    ]
    assert launch(package, path=tmp_path)[-1] == "ended with 1"


# Like Triton's: a child that is told nothing by its parent.
WITH_A_CHILD = """#!/bin/sh
sh -c 'trap "echo child stops; exit 0" TERM; echo child; while :; do sleep 0.02; done' &
trap 'wait; echo server stops; exit 7' TERM
echo server
while :; do sleep 0.02; done
"""


@pytest.mark.skipif(not os.path.exists("/proc/1/task/1/children"), reason="no children in /proc")  # noqa: PTH110
def test_a_stop_reaches_server_and_models_and_is_waited_for(
    tiny_export: Path, tmp_path: Path
) -> None:
    package = words(tiny_export, tmp_path / "p")
    server = program(tmp_path / "tritonserver", WITH_A_CHILD)
    with subprocess.Popen(
        [package / "launch.sh"],
        env={"PATH": "/usr/bin:/bin", "TRITONSERVER": str(server)},
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        started = {running.stdout.readline() for _ in range(2)}
        assert started == {"child\n", "server\n"}
        running.send_signal(signal.SIGTERM)
        rest, _ = running.communicate(timeout=20)
    assert rest == "child stops\nserver stops\n"
    assert running.returncode == 7


def test_an_exit_code_is_passed_on(tiny_export: Path, tmp_path: Path) -> None:
    package = words(tiny_export, tmp_path / "p")
    server = program(tmp_path / "tritonserver", "#!/bin/sh\nexit 5\n")
    assert launch(package, path=tmp_path, TRITONSERVER=str(server)) == ["ended with 5"]


def test_a_readme_says_what_runs_where(tiny_export: Path, tmp_path: Path) -> None:
    package = words(tiny_export, tmp_path / "p", engine="tiny_engine", plugins=["a.so", "b.so"])
    readme = (package / "README.md").read_text("utf-8")
    assert 'plugins="a.so;b.so"' in readme
    assert "`tiny_engine` is the engine itself" in readme
    assert "TensorRT 10.14 alone" in readme
    assert "although the engine that was built is one of\ntensorrt" in readme
    plain = (words(tiny_export, tmp_path / "q") / "README.md").read_text("utf-8")
    assert "TensorRT 10" not in plain
    assert "onnxruntime-gpu" not in plain
    on_gpu = text_model(tiny_export, engine=engine_of(tiny_export, provider="cuda"))
    repository.write_words(tmp_path / "q", source=on_gpu)
    assert "onnxruntime-gpu" in (tmp_path / "q" / "README.md").read_text("utf-8")


def test_a_models_licence_comes_along(tiny_export: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "LICENSES.d").mkdir(parents=True)
    for name in ("LICENSE.txt", "USE_POLICY.md", "config.json"):
        (model / name).write_text(f"this is {name}")
    found = licence_files(model)
    assert [path.name for path in found] == ["LICENSE.txt", "USE_POLICY.md"]
    output = tmp_path / "p"
    output.mkdir()
    repository.write_words(output, source=text_model(tiny_export, licences=found))
    assert (output / "model_licence" / "LICENSE.txt").read_text() == "this is LICENSE.txt"
    notice = (output / "NOTICE.md").read_text("utf-8")
    assert "`model_licence/LICENSE.txt`, `model_licence/USE_POLICY.md`" in notice
    assert "model_licence/USE_POLICY.md" in (output / "SHA256SUMS").read_text("utf-8")
    bare = words(tiny_export, tmp_path / "q")
    assert "no licence file lay beside the weights" in (bare / "NOTICE.md").read_text("utf-8")
    assert not (bare / "model_licence").exists()


def test_requests_of_a_chat_are_shown_where_there_is_a_template(
    tiny_export: Path, tmp_path: Path
) -> None:
    text = (words(tiny_export, tmp_path / "with") / "README.md").read_text("utf-8")
    assert '{"messages": "[' in text
    assert "chat/completions" in text
    plain = tmp_path / "export"
    shutil.copytree(tiny_export, plain)
    (plain / "chat_template.jinja").unlink()
    text = (words(plain, tmp_path / "without") / "README.md").read_text("utf-8")
    assert '"messages"' not in text
    assert "chat/completions" not in text
    assert "v1/completions" in text
    assert "has no chat template" in text


def test_a_load_beyond_the_context_is_refused(tiny_export: Path) -> None:
    check_context(tiny_export, 256, options="--prompt-tokens")
    with pytest.raises(RecipeError, match=r"ask for 257 tokens, and the model's context is 256"):
        check_context(tiny_export, 257, options="--prompt-tokens")
