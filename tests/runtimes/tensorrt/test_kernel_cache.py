"""TensorRT's timing cache, by Polygraphy's own hand: loaded, used again, locked, merged, saved."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from nmexport.runtimes.tensorrt.kernel_cache import timing_cache_path

from tests.support.plugin_build import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_timings_are_used_again_and_those_of_others_stay(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy", reason="the package polygraphy is not installed")
    command = [sys.executable, "-m", "tests.support.timing_cache_builds", tmp_path / "x.timing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # and nothing of Polygraphy's talk is on stdout
    assert found["reused"] == [0, 3]  # cold: none of three; warm: all
    assert found["kept"] == ["gemm", "norm", "softmax", "theirs"]
    events = " ".join(found["events"])
    cold, warm = (run.strip() for run in events.split("build")[1:])
    assert cold.startswith("lock serialise unlock")
    assert "lock load unlock" in cold  # the warm build begins with what the cold one left
    assert warm == "lock load serialise unlock"  # merged with what another process saved meanwhile


def test_timings_are_kept_by_runtime_version_and_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {
        timing_cache_path(runtime="tensorrt", version=version, device=device)
        for version in ("10.14.1", "11.0")
        for device in ("NVIDIA L4", "NVIDIA H100 80GB")
    }
    assert len(paths) == 4
    assert all(path.parent.is_dir() and path.is_relative_to(tmp_path) for path in paths)
    assert {path.suffix for path in paths} == {".timing"}
