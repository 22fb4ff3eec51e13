"""A long load: clients that stay and leave, memory that is counted, what makes a soak fail."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from click.testing import CliRunner
from nmexport.bench import soak
from nmexport.bench.http_load import Ask, drive
from nmexport.bench.perf_analyzer import PerfAnalyzer
from nmexport.bench.soak import Soak
from nmexport.cli import bench_serving
from nmexport.cli.main import cli
from nmexport.errors import EnvironmentFault
from nmexport.progress import Silent
from nmexport.serving import launch
from nmexport.serving.launch import Installation

from tests.support.served import NAME, require_tritonserver, save_package, streaming, triton

if TYPE_CHECKING:
    from pathlib import Path

MEGABYTE = 10**6


# -- clients --------------------------------------------------------------------------------------


def test_clients_stay_or_leave_as_they_are_told() -> None:
    asks = [Ask(fields={"text_input": str(i)}, leave_after=i % 3 or None) for i in range(9)]
    with streaming(pieces=5) as (url, seen):
        answers = drive(url, "m", asks, clients=3)
    assert {one["text_input"] for one in seen} == {str(index) for index in range(9)}
    assert sorted((one.left, one.tokens, len(one.next_ms)) for one in answers) == sorted(
        [(False, 5, 4)] * 3 + [(True, 0, 0)] * 3 + [(True, 0, 1)] * 3
    )
    assert all(one.first_ms > 0 for one in answers)


def test_nobody_asks_on_where_one_failed() -> None:
    endless = (Ask(fields={"text_input": str(index)}) for index in itertools.count())
    with (
        streaming(pieces=2, finishes=False) as (url, seen),
        pytest.raises(EnvironmentFault, match="went away"),
    ):
        drive(url, "m", endless, clients=4)
    assert len(seen) < 50


def test_a_load_has_mixed_lengths_and_some_who_leave() -> None:
    asks = list(itertools.islice(Soak(cancel_every=3).asks(), 24))
    assert len({one.fields["text_input"] for one in asks}) == 4
    assert len({one.fields["max_tokens"] for one in asks}) == 4
    assert sum(one.leave_after is not None for one in asks) == 8
    # Of every length some leave.
    assert len({one.fields["max_tokens"] for one in asks if one.leave_after}) == 4
    leaving = itertools.islice(Soak().asks(only_leaving=True), 10)
    assert all(one.leave_after for one in leaving)


# -- memory ---------------------------------------------------------------------------------------

ALLOCATES = "import subprocess, sys, time; held = b'x' * {bytes}; {rest}; time.sleep(60)"


def test_all_processes_count_and_shared_pages_once() -> None:
    child = ALLOCATES.format(bytes=40 * MEGABYTE, rest="print('held', flush=True)")
    parent = ALLOCATES.format(
        bytes=20 * MEGABYTE, rest=f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        whole = soak.memory_of(process.pid)
        alone = soak._share_of(process.pid)
        for below in psutil.Process(process.pid).children():
            below.kill()
        process.kill()
    assert whole - alone > 40 * MEGABYTE
    assert 20 * MEGABYTE < alone < 60 * MEGABYTE
    assert soak._share_of(process.pid) == 0


def test_growth_is_of_medians_at_both_ends() -> None:
    steady = [(float(i), 100 * MEGABYTE + i % 3) for i in range(100)]
    assert soak._compare_ends(steady)["growth"] == 0
    assert soak._compare_ends([*steady[:50], (50.0, 10**9), *steady[50:]])["growth"] == 0
    leak = [(float(i), 100 * MEGABYTE + i * MEGABYTE // 10) for i in range(100)]
    found = soak._compare_ends(leak)
    assert found["growth"] == pytest.approx(0.0896, abs=0.001)
    assert found["peak_bytes"] == leak[-1][1]


# -- perf_analyzer --------------------------------------------------------------------------------

FAKE_ANALYZER = """#!{python}
import json, os, signal, sys
flags = dict(one.split("=", 1) for one in sys.argv[1:] if one.startswith("--input-data"))
rows = json.load(open(flags["--input-data"]))["data"]
libraries = os.listdir(os.environ["LD_LIBRARY_PATH"])
open({log!r}, "w").write(json.dumps([sys.argv[1:], rows, libraries]))
if "broken" in sys.argv:
    sys.exit("no such model")
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
signal.pause()
"""


@pytest.fixture
def analyzer(tmp_path: Path) -> PerfAnalyzer:
    program = tmp_path / "perf_analyzer"
    program.write_text(FAKE_ANALYZER.format(python=sys.executable, log=str(tmp_path / "log")))
    program.chmod(0o755)
    libraries = tmp_path / "nvidia_pytriton.libs"
    libraries.mkdir()
    for name in ("libb64-98cb.so.0d", "libcudart-0952.so.12.6.77", "libother-1.so"):
        (libraries / name).touch()
    installation = Installation(server=tmp_path / "s", wheel=tmp_path / "pytriton")
    return PerfAnalyzer(program, installation)


def wait_until(holds: Any) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_perf_analyzer_gets_its_libraries_and_prompts(
    analyzer: PerfAnalyzer, tmp_path: Path
) -> None:
    analyzer.start("127.0.0.1:5", "m", Soak(clients=7))
    log = tmp_path / "log"
    wait_until(lambda: log.is_file() and log.read_text().endswith("]"))
    analyzer.check()
    analyzer.stop()
    words, rows, libraries = json.loads(log.read_text())
    assert words[:5] == ["-m", "m", "-u", "127.0.0.1:5", "-i"]
    assert "--concurrency-range=7" in words
    assert sorted(libraries) == ["libb64.so.0d", "libcudart.so.12"]
    assert len(rows) == 8
    assert {row["stream"][0] for row in rows} == {True}


def test_a_perf_analyzer_that_ends_is_told(analyzer: PerfAnalyzer, tmp_path: Path) -> None:
    analyzer.start("127.0.0.1:5", "broken", Soak())
    process = analyzer._process
    assert process is not None
    process.wait(20)
    with pytest.raises(EnvironmentFault, match=r"ended with 1:\n.*no such model"):
        analyzer.check()
    analyzer.stop()
    with pytest.raises(EnvironmentFault, match="tritonclient"):
        PerfAnalyzer(tmp_path / "none", Installation(server=tmp_path))


# -- the verb -------------------------------------------------------------------------------------


def outcome(growth: float, held: int) -> dict[str, Any]:
    memory = {"before_bytes": 10**9, "after_bytes": 10**9, "peak_bytes": 2 * 10**9}
    return {
        "load": {"clients": 4, "warmup_seconds": 60},
        "by": "nmexport",
        "seconds": 300.0,
        "memory": {**memory, "growth": growth, "samples": []},
        "requests": {"finished": 12, "cancelled": 3, "failed": 0},
        "tokens_per_s": 5.0,
        "mean_ttft_ms": None,
        "mean_itl_ms": 2.0,
        "left_over": {"requests": held, "cache_bytes": 0},
    }


@pytest.mark.parametrize(
    ("growth", "held", "words"),
    [(0.019, 0, None), (-0.3, 0, None), (0.021, 0, "grew by 2.10%"), (0.0, 1, "still holds")],
)
def test_growth_and_what_is_held_fail_a_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: float, held: int, words: str | None
) -> None:
    server = tmp_path / "tritonserver"
    server.touch()
    monkeypatch.setattr(bench_serving, "_start", lambda *_: contextlib.nullcontext((object(), "m")))
    monkeypatch.setattr(soak, "soak", lambda *_, **__: outcome(growth, held))
    result = CliRunner().invoke(
        cli, ["bench", "soak", str(tmp_path), "--server", str(server), "--max-growth", "0.02"]
    )
    assert result.exit_code == (0 if words is None else 3)
    assert words is None or words in result.stderr
    assert f"{growth:+.2%}" in result.stdout


@pytest.mark.slow
def test_a_server_keeps_its_memory_under_load(tiny_export: Path, tmp_path: Path) -> None:
    require_tritonserver()
    save_package(tiny_export, tmp_path / "package")
    load = Soak(seconds=40, warmup_seconds=20, cancel_every=4)
    with triton(tmp_path / "package" / "model_repository", tmp_path / "log") as server:
        found = soak.soak(server, NAME, load, progress=Silent())
    assert found["memory"]["growth"] < 0.02
    assert found["requests"]["finished"] > 100
    assert found["requests"]["cancelled"] > 0
    assert found["requests"]["failed"] == 0
    assert found["left_over"] == {"requests": 0, "cache_bytes": 0}
    assert launch.is_ready(server.addresses.http) is False
