"""What `make` does about things that fail, skip, or take long."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import refuse_skip
from tests.support.plugin_build import ROOT, build_script

if TYPE_CHECKING:
    from pathlib import Path

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@needs_make
@pytest.mark.parametrize("name", [".engines", ".server", ".wheel"])
def test_what_failed_to_install_is_tried_again(tmp_path: Path, name: str) -> None:
    stamp = tmp_path / name
    installed = tmp_path / ".installed"
    installed.touch()
    given = (f"VENV={tmp_path}", "-o", str(installed), str(stamp))
    failed = make("PIP=false", *given)
    assert failed.returncode == 0, failed.stderr
    assert "its tests will skip" in failed.stdout
    assert not stamp.exists()
    assert make("PIP=true", *given).returncode == 0
    assert stamp.exists()


@needs_make
def test_gpu_tests_build_both_libraries_and_refuse_skips(tmp_path: Path) -> None:
    dry = make("--dry-run", f"GPU_VENV={tmp_path}", "test-gpu").stdout
    assert dry.index("nvidia-smi") < dry.index("-m venv")
    assert "plugins/tensorrt/build.py" in dry
    assert "NMEXPORT_CUDA=native" in dry
    assert 'pip --quiet --disable-pip-version-check install "onnxruntime-gpu' in dry
    assert "tests/gpu --no-skips" in dry


@needs_make
def test_a_demo_installs_no_tool_of_the_tests(tmp_path: Path) -> None:
    dry = make("--dry-run", f"VENV={tmp_path}", "demo").stdout
    assert "--constraint requirements.lock" in dry
    assert "install -r requirements.lock" not in dry
    tests = make("--dry-run", f"VENV={tmp_path}", "test").stdout
    assert tests.index("--constraint requirements.lock") < tests.index(
        "install -r requirements.lock"
    )


@needs_make
def test_lint_checks_the_format_of_python_and_all_cpp() -> None:
    dry = make("--dry-run", "lint").stdout
    assert "ruff format --check" in dry
    assert "clang-format --dry-run --Werror" in dry
    for suffix in ("cpp", "h", "inl", "cu", "cuh"):
        assert f"-name '*.{suffix}'" in dry


@pytest.mark.parametrize("reason", [("file.py", 3, "Skipped: no plugin"), "no plugin"])
def test_a_skip_becomes_a_failure_that_says_why(reason: object) -> None:
    report = pytest.TestReport(
        nodeid="x",
        location=("x", 1, "x"),
        keywords={},
        outcome="skipped",
        longrepr=reason,
        when="call",
    )
    refuse_skip(report)
    assert report.failed
    assert "no plugin" in report.longreprtext


@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_what_ran_is_left_as_it_is(outcome: str) -> None:
    report = pytest.TestReport(
        nodeid="x",
        location=("x", 1, "x"),
        keywords={},
        outcome=outcome,
        longrepr=None,
        when="call",
    )
    refuse_skip(report)
    assert report.outcome == outcome


def test_a_long_build_is_counted_while_it_runs(capfd: pytest.CaptureFixture[str]) -> None:
    script = build_script()
    told = "print('[1/2] one'); print('a kernel has 40 registers'); print('[ 50%] two')"
    text = script._run_shown([sys.executable, "-c", told])
    assert text.splitlines() == ["[1/2] one", "a kernel has 40 registers", "[ 50%] two"]
    assert capfd.readouterr().err.splitlines() == ["[1/2] one", "[ 50%] two"]
    with pytest.raises(script.BuildError, match="an error of its own"):
        script._run_shown(
            [sys.executable, "-c", "import sys; print('an error of its own'); sys.exit(3)"]
        )
    with pytest.raises(script.BuildError, match="no-such-program"):
        script._run_shown(["no-such-program"])
