"""The plugin's C++: unit tests under sanitizers, the build script, what the library exports."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from nmexport.errors import EnvironmentFault
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.plugin_build import ROOT, build_script, built, check_linkage

if TYPE_CHECKING:
    from pathlib import Path


def test_the_plugin_classes_under_sanitizers(tmp_path: Path) -> None:
    program = built("build_tests", tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout


def test_a_library_that_exports_more_is_noticed(tmp_path: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    library = tmp_path / "libleaky.so"
    source = tmp_path / "leaky.cpp"
    source.write_text('extern "C" void getCreators() {}\nvoid leaked() {}\n')
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(AssertionError):
        check_linkage(library)


def test_a_library_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "libforeign.so"
    foreign.write_bytes(b"no library")
    with pytest.raises(EnvironmentFault, match=r"cannot be loaded.*\n.*\n.*tensorrt/build\.py"):
        tensorrt_library.describe_plugin(foreign)


def test_headers_are_taken_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = build_script()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(script.BuildError, match=r"holds no include/NvInferRuntime\.h"):
        script.find_headers()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInferRuntime.h").touch()
    assert script.find_headers() == tmp_path / "include"


def test_a_toolkit_is_found_or_its_absence_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = build_script()
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    monkeypatch.setattr(script, "TOOLS", tmp_path / "tools")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(script.Path, "glob", lambda *_: iter(()))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for name in ("bin/nvcc", "include/cuda_runtime_api.h"):
        path = tmp_path / "cuda" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert script.find_toolkit(fetch=False).nvcc == tmp_path / "cuda/bin/nvcc"
    (tmp_path / "cuda/bin/nvcc").unlink()
    if not (ROOT / "/usr/local/cuda/bin/nvcc").exists():
        with pytest.raises(script.BuildError, match="no CUDA toolkit"):
            script.find_toolkit(fetch=False)


def test_a_failed_build_shows_the_compilers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    script = build_script()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    with pytest.raises(script.BuildError, match=r"NvInferRuntime\.h"):
        script.build_tests(tmp_path / "build")
    with pytest.raises(script.BuildError, match=r"(?s)cmake.*failed"):
        script._run(["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "b")])
