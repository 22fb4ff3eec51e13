"""What nvcc says of the CUDA kernels: they compile for every supported GPU, and none spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "plugins" / "kernels" / "cuda"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+)'")


def spilling_kernels(report: str) -> tuple[dict[str, int], list[str]]:
    """Kernels compiled for each architecture, and those that spill, from `ptxas -v`."""
    counts: dict[str, int] = {}
    spilling = []
    entry = ("", "")
    for line in report.splitlines():
        if found := _ENTRY.search(line):
            entry = (found[1], found[2])
            counts[entry[1]] = counts.get(entry[1], 0) + 1
        elif (found := _SPILL.search(line)) and (int(found[2]) or int(found[3])):
            spilling.append(f"{entry[1]} {entry[0]}: {found[0]}")
    return counts, spilling


def test_the_report_is_read():
    report = """
ptxas info    : Compiling entry function '_Za' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Zb' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""
    counts, spilling = spilling_kernels(report)
    assert counts == {"sm_80": 1, "sm_90": 1}
    assert spilling == ["sm_90 _Zb: 8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", ["mask.cu", "decode_bfloat16.cu"])
def test_no_kernel_spills_on_any_supported_gpu(source: str, tmp_path: Path):
    """The decode kernels of float16 and float32 are the same templates."""
    done = subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-O3",
            "--threads=2",
            "-Xptxas=-v",
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
            f"-I{KERNELS}",
            "-c",
            str(KERNELS / source),
            "-o",
            str(tmp_path / "kernels.o"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts, spilling = spilling_kernels(done.stdout + done.stderr)
    assert sorted(counts) == sorted(f"sm_{a}" for a in ARCHITECTURES)
    assert len(set(counts.values())) == 1, counts
    assert spilling == []
