"""What could hurt: a probe that fails on a machine unlike ours, or claims what is not there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nmexport import environment
from nmexport.environment import Gpu, gpus_from_query, physical_cores, probe
from nmexport.inspect import doctor
from nmexport.inspect.doctor import NativeLibrary
from nmexport.progress import Bars, Lines, Silent, duration, on_stream


def test_probe_is_json_and_knows_this_machine() -> None:
    found = probe()
    assert json.loads(json.dumps(found.as_dict()))["cores"] >= 1
    assert found.version("numpy")
    assert found.version("no-such-package") is None
    assert found.memory_bytes > 2**28


def test_gpus_as_the_driver_prints_them() -> None:
    text = "NVIDIA H100, 550.54, 9.0, 81559\nNVIDIA GB10, 580.1, 12.1, [N/A]\nnonsense\n"
    assert gpus_from_query(text) == (
        Gpu(
            name="NVIDIA H100",
            driver="550.54",
            compute_capability="9.0",
            memory_bytes=81559 * 2**20,
        ),
        Gpu(name="NVIDIA GB10", driver="580.1", compute_capability="12.1", memory_bytes=0),
    )


@pytest.mark.parametrize("fault", [subprocess.CalledProcessError(9, "nvidia-smi"), OSError(), None])
def test_broken_driver_is_no_gpu(monkeypatch, fault: Exception | None) -> None:
    def answer(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        if fault is not None:
            raise fault
        return subprocess.CompletedProcess([], 0, stdout="A, 1, 9.0, 10\n")

    monkeypatch.setattr(environment.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(environment.subprocess, "run", answer)
    assert len(environment._gpus()) == (0 if fault else 1)


def test_without_linux_files(monkeypatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert physical_cores() >= 1
    assert environment._cpu_model()
    assert environment._isa_flags() == ()
    assert environment._memory_bytes() > 0
    monkeypatch.delattr(environment.os, "sched_getaffinity")
    assert physical_cores() >= 1


ABSENT = NativeLibrary(why_missing="no compiler was found")


def test_every_missing_thing_has_a_mend(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "is_installed", lambda module: False)
    monkeypatch.setattr(doctor, "native_library", lambda: ABSENT)
    states = {state.target: state for state in doctor.diagnose()}
    assert list(states) == ["onnxruntime", "tensorrt", "tensorrt-rtx"]
    assert not any(state.works for state in states.values())
    for state in states.values():
        assert all(one.what and one.mend for one in state.missing)
    assert states["onnxruntime"].missing[0].mend == "pip install onnxruntime"


@pytest.mark.parametrize("compiler", ["/usr/bin/c++", None])
def test_missing_library_slows_and_does_not_forbid(monkeypatch, compiler: str | None) -> None:
    monkeypatch.setattr(doctor, "native_library", lambda: ABSENT)
    monkeypatch.setattr(doctor, "compiler", lambda: compiler)
    state = doctor.diagnose()[0]
    assert state.works
    assert "no compiler was found" in state.missing[0].what
    assert ("install a C++17 compiler" in state.missing[0].mend) == (compiler is None)


# -- progress -------------------------------------------------------------------------------------


def test_lines_count_estimate_and_end() -> None:
    stream, ticks = io.StringIO(), iter(range(0, 100, 3))
    lines = Lines(stream, every=5, clock=lambda: float(next(ticks)))
    assert list(lines.track(range(4), label="layers")) == [0, 1, 2, 3]
    said = stream.getvalue().splitlines()
    assert said[0].startswith("layers: 2/4, about 6 s left, peak ")
    assert said[-1].startswith("layers: 4/4 in 15 s, peak ")


def test_lines_without_a_known_length() -> None:
    stream, ticks = io.StringIO(), iter(range(0, 100, 6))
    lines = Lines(stream, every=5, clock=lambda: float(next(ticks)))
    assert list(lines.track(iter("ab"), label="pieces")) == ["a", "b"]
    assert stream.getvalue().startswith("pieces: 1, peak ")


def test_quick_work_says_nothing() -> None:
    stream = io.StringIO()
    assert list(Lines(stream).track([1], label="x")) == [1]
    assert stream.getvalue() == ""


def test_bars_inside_bars_and_notes(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    bars = Bars(stream)
    for _ in bars.track(range(2), label="outer"):
        bars.note("[a note]")
        assert list(bars.track(iter("ab"), label="inner")) == ["a", "b"]
    assert stream.getvalue().count("[a note]") == 2


def test_an_abandoned_bar_frees_the_terminal() -> None:
    bars = Bars(io.StringIO())
    tracked = bars.track(range(9), label="outer")
    next(tracked)
    tracked.close()
    assert bars._bars is None


def test_stream_decides() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(on_stream(io.StringIO()), Lines)
    assert isinstance(on_stream(Terminal()), Bars)
    silent = Silent()
    silent.note("x")
    assert list(silent.track("ab", label="x")) == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (59.4, "59 s"), (187, "3 min 07 s"), (7500, "2 h 05 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_native_library_present_absent_or_broken(monkeypatch, tmp_path: Path) -> None:
    from nmexport.runtimes import native

    monkeypatch.setattr(native, "find_library", lambda: None)
    monkeypatch.setattr(native, "why_missing", lambda: "not built")
    assert doctor.native_library() == NativeLibrary(why_missing="not built")
    path = tmp_path / "libx.so"
    path.write_bytes(b"no library")
    monkeypatch.setattr(native, "find_library", lambda: path)
    broken = doctor.native_library()
    assert broken.path == str(path)
    assert "cannot be loaded" in str(broken.why_missing)
    monkeypatch.setattr(native, "describe_library", lambda path: {"variant": "portable"})
    assert doctor.native_library().description == {"variant": "portable"}


def test_free_memory_heeds_the_containers_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert environment.free_memory() > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 700\nactive_file 300\n")
    monkeypatch.setattr(environment, "Path", lambda _: tmp_path)
    assert environment.free_memory() == 3700
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.free_memory() > 3700


def test_onnxruntime_sends_and_says_nothing_where_home_cannot_be_written() -> None:
    program = (
        "import nmexport.runtimes.onnxruntime_session, os, onnxruntime\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != _TELEMETRY}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "HOME": "/proc/no-such-home", "XDG_CACHE_HOME": "/proc/none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


_TELEMETRY = "ORT_DISABLE_TELEMETRY"
