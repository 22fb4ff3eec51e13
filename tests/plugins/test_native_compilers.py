"""Every C++ compiler found here builds the native code without a warning and passes its tests.

Whoever installs the package never fails on a warning: a compiler newer than these may know more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.plugin_build import (
    ROOT,
    build,
    build_hook,
    build_script,
    cmake_tool,
    configure,
    run_tool,
)

COMPILERS = (
    "c++",
    *(f"g++-{version}" for version in range(11, 17)),
    *(f"clang++-{version}" for version in range(13, 24)),
    "g++",
    "clang++",
)
STRICT = "-DNMEXPORT_WARNINGS_AS_ERRORS=ON"


def ort_headers() -> list[str]:
    """Add ONNX Runtime's ops where its headers can be had; the kernels build without."""
    hook = build_hook()
    try:
        return [f"-DONNXRUNTIME_INCLUDE_DIR={hook.find_headers(ROOT)}"]
    except hook.BuildError:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILERS)
def test_the_native_code_builds_without_a_warning(name: str, tmp_path: Path) -> None:
    compiler = shutil.which(name)
    if compiler is None:
        pytest.skip(f"no {name}")
    earlier = map(shutil.which, COMPILERS[: COMPILERS.index(name)])
    if any(other and Path(compiler).samefile(other) for other in earlier):
        pytest.skip("it had its turn by another name")
    script = build_script()
    chosen = f"-DCMAKE_CXX_COMPILER={compiler}"
    headers = ort_headers()
    if name == "c++":  # CMake's own choice: what `make native-test` compiled with it lies there
        ops = ROOT / "build" / "native-strict"
        configure(ROOT / "plugins", ops, STRICT, *headers)
    else:
        ops = tmp_path / "ops"
        configure(ROOT / "plugins", ops, chosen, STRICT, *headers)
    targets = ["native_tests", *(["nmexport_onnxruntime"] if headers else [])]
    build(ops, *targets)
    run_tool(cmake_tool("ctest"), "--test-dir", ops, "--output-on-failure")
    try:
        folders = [
            f"-DTENSORRT_INCLUDE_DIR={script.find_headers()}",
            f"-DCUDA_INCLUDE_DIR={script.find_toolkit().include}",
            "-DNMEXPORT_PLUGIN_TESTS_ONLY=ON",
        ]
    except script.BuildError:
        return  # the plugin has its own tests where its headers can be had
    configure(ROOT / "plugins" / "tensorrt", tmp_path / "plugin", chosen, STRICT, *folders)
    build(tmp_path / "plugin", "test_plugin", "recording_plugin")
    run_tool(cmake_tool("ctest"), "--test-dir", tmp_path / "plugin", "--output-on-failure")


@pytest.mark.parametrize("strict", [False, True])
def test_warnings_are_errors_in_our_own_tests_alone(strict: bool, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    options = [STRICT] if strict else []
    configure(ROOT / "plugins", tmp_path, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", *options)
    commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    assert commands
    for entry in commands:
        assert "-Wall" in entry["command"]
        assert ("-Werror" in entry["command"]) == strict, entry["file"]
