"""Each example continues a text as `nmexport generate` does, where its runtime can be installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from tests.support.other_runtimes import GENAI, install, save_for_other_runtimes
from tests.support.plugin_build import build_hook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.exported import Exported

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = "The quick"
NODE = "onnxruntime-node@1.30.0"


@pytest.fixture(scope="module")
def served(
    tiny_llama: Path, plain_export: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    return save_for_other_runtimes(tiny_llama, plain_export, folder)


def run(command: list[str], **variables: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(name: str, folder: Path, **variables: str) -> str:
    return run([sys.executable, str(EXAMPLES / name), str(folder), PROMPT], **variables)


@pytest.fixture(scope="module")
def expected(served: Path) -> str:
    """What plain ONNX Runtime continues; itself held to the function bodies below."""
    return python("with_onnxruntime.py", served)


def test_plain_onnxruntime_needs_the_op_for_speed_alone(
    served: Path, expected: str, tmp_path: Path
) -> None:
    assert expected.startswith(PROMPT)
    assert len(expected) > len(PROMPT) + 10
    bare = shutil.copytree(served, tmp_path / "bare", ignore=shutil.ignore_patterns("*.so"))
    assert python("with_onnxruntime.py", bare) == expected


def test_every_example_is_listed_and_short() -> None:
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.glob("with_*"):
        assert f"[`{path.name}`]({path.name})" in listed
        assert len(path.read_text("utf-8").splitlines()) <= 36


def test_a_host_in_cpp_runs_the_op(served: Path, expected: str, tmp_path: Path) -> None:
    compiler, hook = shutil.which("c++"), build_hook()
    package = Path(str(find_spec("onnxruntime").origin)).parent
    library = next(package.glob("capi/libonnxruntime.so.*"), None)
    try:
        include = hook.find_headers(ROOT)
    except hook.BuildError as error:
        pytest.skip(str(error))
    if compiler is None or library is None:
        pytest.skip("no C++ compiler, or no shared library in ONNX Runtime's package")
    # Under the names that its release archive has.
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(library)
    source, program = EXAMPLES / "with_cpp.cpp", tmp_path / "with_cpp"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-isystem{include}"]
    linked = [f"-L{tmp_path}", "-lonnxruntime", f"-Wl,-rpath,{tmp_path}", "-o", str(program)]
    run([compiler, *options, str(source), *linked])
    tokenizer = Tokenizer.from_file(str(served / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    told = [int(token) for token in run([str(program), str(served), *map(str, ids)]).split()]
    assert tokenizer.decode(ids + told) + "\n" == expected


@pytest.mark.slow
def test_genai_loads_the_op_by_its_configuration(
    served: Path, expected: str, tmp_path: Path
) -> None:
    install([sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, GENAI])
    assert python("with_genai.py", served, PYTHONPATH=str(tmp_path)) == expected
    lost = shutil.copytree(served, tmp_path / "lost", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, str(EXAMPLES / "with_genai.py"), str(lost), PROMPT]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "Failed to load library" in done.stderr  # so it was the op that ran above


@pytest.mark.slow
def test_node_runs_the_function_bodies(served: Path, expected: str, tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node.js is not installed")
    install([npm, "install", "--ignore-scripts", "--prefix", tmp_path, NODE])
    shutil.copy(EXAMPLES / "with_node.mjs", tmp_path)
    tokenizer = Tokenizer.from_file(str(served / "tokenizer.json"))
    ids = [str(token) for token in tokenizer.encode(PROMPT).ids]
    told = run([node, str(tmp_path / "with_node.mjs"), str(served), *ids]).split()
    assert tokenizer.decode([int(token) for token in told]) + "\n" == expected


@pytest.mark.slow
def test_optimum_takes_the_op_too(served: Path, expected: str) -> None:
    other = os.environ.get("NMEXPORT_OPTIMUM_PYTHON")
    if not other:
        pytest.skip("NMEXPORT_OPTIMUM_PYTHON is not set")
    config: Mapping[str, object] = json.loads((served / "generation_config.json").read_text())
    shown = run([other, str(EXAMPLES / "with_optimum.py"), str(served), PROMPT])
    # Optimum ends at the end token, the other examples do not.
    assert config["eos_token_id"] is not None
    assert expected.startswith(shown.rstrip("\n"))
