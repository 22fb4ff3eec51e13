"""What could hurt: a probe that fails on a machine unlike ours, or claims what is not there."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nmexport import environment
from nmexport.environment import Gpu, clocks_now, device_name, physical_cores, probe
from nmexport.inspect import doctor
from nmexport.inspect.doctor import NativeLibrary
from nmexport.progress import Bars, Lines, Silent, busy, duration, on_stream
from nmexport.runtimes import rebuilding


def test_probe_is_json_and_knows_this_machine() -> None:
    found = probe()
    assert json.loads(json.dumps(found.as_dict()))["cores"] >= 1
    assert found.version("numpy")
    assert found.version("no-such-package") is None
    assert found.memory_bytes > 2**28


SMI = {
    environment._GPU_QUERY: (
        "NVIDIA H100, 550.54, 9.0, 81559, GPU-first, 1980, 2619\n"
        "NVIDIA GB10, 580.1, 12.1, [N/A], GPU-second, 3003, [N/A]\nnonsense\n"
    ),
    environment._CLOCK_QUERY: "GPU-first, 1755, 2619\nGPU-second, 208, [N/A]\n",
}


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs."""

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        query = command[1].removeprefix("--query-gpu=")
        return subprocess.CompletedProcess(command, 0, stdout=SMI[query])

    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(environment.subprocess, "run", answer)


@pytest.mark.usefixtures("smi")
def test_gpus_as_the_driver_prints_them() -> None:
    h100, gb10 = environment._gpus()
    assert h100 == Gpu(
        name="NVIDIA H100",
        driver="550.54",
        compute_capability="9.0",
        memory_bytes=81559 * 2**20,
        uuid="GPU-first",
        sm_mhz=1980,
        memory_mhz=2619,
    )
    assert gb10 == Gpu(
        name="NVIDIA GB10",
        driver="580.1",
        compute_capability="12.1",
        memory_bytes=0,
        uuid="GPU-second",
        sm_mhz=3003,
    )


@pytest.mark.parametrize("fault", [subprocess.CalledProcessError(9, "nvidia-smi"), OSError(), None])
def test_broken_driver_is_no_gpu(monkeypatch, fault: Exception | None) -> None:
    def answer(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        if fault is not None:
            raise fault
        return subprocess.CompletedProcess([], 0, stdout="A, 1, 9.0, 10, GPU-1, 2, 3\n")

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
        assert all(one.what and one.fix for one in state.missing)
    assert states["onnxruntime"].missing[0].fix == "pip install onnxruntime"


def test_missing_library_slows_and_does_not_forbid(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "native_library", lambda: ABSENT)
    state = doctor.diagnose()[0]
    assert state.works
    assert "no compiler was found" in state.missing[0].what
    assert state.missing[0].fix == rebuilding.rebuild_command()


REINSTALL = "-m pip install --no-deps --force-reinstall"
HEADERS = f"set {rebuilding.INCLUDE_VARIABLE}"


@pytest.mark.parametrize(
    ("compiler", "why", "says"),
    [
        ("/usr/bin/c++", None, r"^{python} {pip} --editable {root}$"),
        (None, None, r"^NMEXPORT_WHEEL_MACHINE=x86_64 {python} {pip} --editable {root}$"),
        (
            "/usr/bin/c++",
            HEADERS,
            (
                r"^curl -L \S+/onnxruntime-linux-x64-([\d.]+)\.tgz \| tar -xz && "
                r"NMEXPORT_ORT_INCLUDE=\$PWD/onnxruntime-linux-x64-\1/include {python} {pip}"
            ),
        ),
    ],
)
def test_one_command_rebuilds_a_source_tree(
    monkeypatch, compiler: str | None, why: str | None, says: str
) -> None:
    monkeypatch.setattr(rebuilding, "compiler", lambda: compiler)
    monkeypatch.setattr(rebuilding.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(rebuilding, "version", lambda package: "1.32.0")
    root = Path(doctor.__file__).resolve().parents[2]
    words = {"python": re.escape(sys.executable), "pip": REINSTALL, "root": re.escape(str(root))}
    assert re.search(says.format(**words), rebuilding.rebuild_command(why_missing=why))


def test_an_installed_package_is_installed_anew(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rebuilding, "NATIVE_FOLDER", tmp_path / "nmexport" / "_native")
    assert rebuilding.rebuild_command() == f"{sys.executable} {REINSTALL} nmexport"
    assert "--no-binary nmexport" in rebuilding.cuda_command()


def test_on_a_gpu_machine_the_doctor_says_what_the_gpu_lacks(monkeypatch) -> None:
    library = NativeLibrary(path="/x.so", description={"variant": "avx2", "cuda": False})
    monkeypatch.setattr(doctor, "native_library", lambda: library)
    monkeypatch.setattr(doctor, "is_distributed", lambda package: False)
    monkeypatch.setattr(doctor.tensorrt_library, "gpu_is_usable", lambda: False)
    assert doctor.diagnose()[0].missing == ()
    monkeypatch.setattr(doctor.tensorrt_library, "gpu_is_usable", lambda: True)
    monkeypatch.setattr(rebuilding.shutil, "which", lambda name: None)
    runtime, kernels = doctor.diagnose()[0].missing
    assert "onnxruntime-gpu" in runtime.fix
    assert re.match(r'CUDACXX="\$\(.* --nvcc\)" NMEXPORT_CUDA=native .*--editable', kernels.fix)
    assert not runtime.needed
    assert not kernels.needed


# -- what computes --------------------------------------------------------------------------------


@pytest.fixture
def machine(smi: None, monkeypatch: pytest.MonkeyPatch) -> environment.Environment:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return dataclasses.replace(probe(), cpu="Some CPU", gpus=environment._gpus())


FIRST = "NVIDIA H100, 80 GiB, up to 1980 MHz, memory up to 2619 MHz"
SECOND = "NVIDIA GB10, up to 3003 MHz"
UNSEEN = "a CUDA GPU that nvidia-smi does not show"


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        *((None, FIRST), ("", FIRST), ("0", FIRST), ("1,0", SECOND), ("GPU-second", SECOND)),
        *(("GPU-sec,GPU-first", SECOND), ("7", UNSEEN), ("MIG-x", UNSEEN)),
    ],
)
def test_a_gpu_is_named_with_memory_and_clocks(
    machine: environment.Environment,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    name: str,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_name(machine, on_gpu=False) == "Some CPU"
    assert device_name(machine, on_gpu=True) == name
    assert device_name(dataclasses.replace(machine, gpus=()), on_gpu=True) == UNSEEN


def test_clocks_are_those_of_the_gpu_in_use(
    machine: environment.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clocks_now(machine) == "1755 MHz after the last run, memory 2619 MHz"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert clocks_now(machine) is None, "this one does not say its memory's"
    assert clocks_now(dataclasses.replace(machine, gpus=())) is None


# -- progress -------------------------------------------------------------------------------------


def test_lines_count_estimate_and_end() -> None:
    stream, ticks = io.StringIO(), iter(range(0, 100, 3))
    lines = Lines(stream, every=5, clock=lambda: float(next(ticks)))
    assert list(lines.track(range(4), label="layers")) == [0, 1, 2, 3]
    said = stream.getvalue().splitlines()
    assert said[0].startswith("layers: 2/4, about 6 s left, peak ")
    assert said[-1].startswith("layers: 4/4 in 15 s, peak ")


def test_whoever_stops_early_has_a_last_line_too() -> None:
    stream, ticks = io.StringIO(), iter(range(0, 100, 3))
    lines = Lines(stream, every=50, clock=lambda: float(next(ticks)))
    for item in lines.track(range(2048), label="own text"):
        if item == 3:
            break
    assert stream.getvalue().startswith("own text: 4/2048, ended early, in 12 s, peak ")


def test_a_long_step_shows_while_it_runs_and_says_how_long_it_took() -> None:
    stream, ticks = io.StringIO(), iter((0, 40, 40, 40))
    with busy(Lines(stream, clock=lambda: float(next(ticks))), "load the model"):
        pass
    assert stream.getvalue().startswith("load the model: 1/1 in 40 s, peak ")
    shown = Bars(io.StringIO())
    with busy(shown, "load the model"):
        assert shown._bars is not None
    assert shown._bars is None


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
        "import nmexport.runtimes.onnxruntime_opening, os, onnxruntime\n"
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
