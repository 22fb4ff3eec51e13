"""The CUDA kernels without a GPU: what nvcc says of them, and the ops that launch them.

They compile for every supported GPU and none spills, and the TensorRT plugin that carries them
exports its entry points; the ops run on kernels that only take notes.
"""

from __future__ import annotations

import operator
import re
import shutil
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from nmexport import __version__
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.plugin_build import (
    ROOT,
    build,
    build_hook,
    build_script,
    build_whole_library,
    check_linkage,
    configure,
    run_tool,
)

if TYPE_CHECKING:
    from pathlib import Path

_HOLDS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
KERNELS_FOLDER = ROOT / "plugins" / "kernels" / "cuda"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
KERNELS = ("decodeKernel", "maskKernel", "epilogueKernel")
TYPES = ("float", "__half", "__nv_bfloat16")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+)'")
# In a mangled name: the kernel's own, and the element type where its templates begin with one.
_KERNEL = re.compile(
    r"\d([a-z][A-Za-z]*Kernel)(?:I(?:NS\w?_11DecodeShapeI)?(?:(f)|6(__half)|13(__nv_bfloat16)))?"
)


def kind_of(mangled: str) -> str:
    """`decodeKernel __half` of its mangled name."""
    found = _KERNEL.search(mangled)
    if found is None:
        return mangled
    types = ["float" if name == "f" else name for name in found.groups()[1:] if name]
    return " ".join([found[1], *types])


def spilling_kernels(report: str) -> tuple[dict[str, Counter[str]], list[str]]:
    """Kernels compiled for each architecture, and those that spill, from `ptxas -v`."""
    counts: dict[str, Counter[str]] = {}
    spilling = []
    entry = ("", "")
    for line in report.splitlines():
        if found := _ENTRY.search(line):
            entry = (found[1], found[2])
            counts.setdefault(entry[1], Counter())[kind_of(entry[0])] += 1
        elif (found := _SPILL.search(line)) and (int(found[2]) or int(found[3])):
            spilling.append(f"{entry[1]} {entry[0]}: {found[0]}")
    return counts, spilling


def test_the_report_is_read():
    report = """
ptxas info    : Compiling entry function '_ZN4cuda3_G_8_mask_cu10maskKernelIfNS1_4RankIfEEEEv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN4cuda12decodeKernelINS0_11DecodeShapeI6__halfLi4EEE' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN4cuda3_G_9_decode_cu11probeKernelEv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""  # noqa: E501 (lines of ptxas)
    counts, spilling = spilling_kernels(report)
    assert counts == {
        "sm_80": {"maskKernel float": 1},
        "sm_90": {"decodeKernel __half": 1, "probeKernel": 1},
    }
    assert len(spilling) == 1
    assert spilling[0].startswith("sm_90 _ZN4cuda12decodeKernel")
    assert spilling[0].endswith("8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads")


def sources_of(name: str, cmake: str) -> set[Path]:
    """The files that a list of CMakeLists.txt names, and what they include."""
    listed = re.search(rf"set\({name} ([^)]*)\)", cmake)
    assert listed is not None
    waiting = [KERNELS_FOLDER / file for file in listed[1].split()]
    found: set[Path] = set()
    while waiting:
        source = waiting.pop()
        found.add(source)
        included = re.findall(r'#include "(.+)"', source.read_text(encoding="utf-8"))
        waiting += {KERNELS_FOLDER / file for file in included} - found
    return found


def differences(sources: set[Path], this: int, older: int) -> list[str]:
    """Conditions on the architecture that do not hold for both or for neither."""
    conditions = [
        (source.name, *condition)
        for source in sources
        for condition in re.findall(
            r"__CUDA_ARCH__ ([<>=!]+) (\d+)", source.read_text(encoding="utf-8")
        )
    ]
    assert conditions
    return [
        f"{name}: {sign} {value}"
        for name, sign, value in conditions
        if _HOLDS[sign](10 * this, int(value)) != _HOLDS[sign](10 * older, int(value))
    ]


def test_ptx_is_shared_where_sources_read_the_same() -> None:
    cmake = (KERNELS_FOLDER / "CMakeLists.txt").read_text(encoding="utf-8")
    rows = re.findall(r"(\d+):(\d+):(\d+)", cmake)
    assert rows
    for this, *older in ([int(part) for part in row] for row in rows):
        for name, shared in zip(("without_float8", "with_float8"), older, strict=True):
            assert differences(sources_of(name, cmake), this, shared) == []
    assert differences(sources_of("with_float8", cmake), 89, 80) != []


@pytest.fixture(scope="module")
def whole_plugin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The TensorRT plugin for all supported GPUs, and what the compilers said, in minutes."""
    return build_whole_library(tmp_path_factory.mktemp("plugin"))


@pytest.mark.slow
def test_the_library_builds_and_exports_its_entry_points_alone(
    whole_plugin: tuple[Path, str],
) -> None:
    """Fast tests check the same of the library on recording kernels: see `built`."""
    library, _ = whole_plugin
    described = tensorrt_library.describe_plugin(library)
    assert described["version"] == __version__
    assert described["architectures"] == build_script().ARCHITECTURES.replace(";", ",")
    check_linkage(library)


@pytest.mark.slow
def test_no_kernel_spills_on_any_supported_gpu(whole_plugin: tuple[Path, str]):
    _, report = whole_plugin
    counts, spilling = spilling_kernels(report)
    assert sorted(counts) == sorted(f"sm_{a}" for a in ARCHITECTURES)
    assert len({tuple(sorted(kinds.items())) for kinds in counts.values()}) == 1, counts
    # The masks, the epilogue and the decode kernels of every type are among them.
    assert counts["sm_90"].keys() >= {f"{kernel} {t}" for kernel in KERNELS for t in TYPES}
    assert spilling == []


@pytest.mark.slow
def test_kernels_for_this_machines_gpus_need_a_gpu(tmp_path: Path):
    """Without one nvcc would take its oldest architecture for `native`, and say nothing."""
    script = build_script()
    cmake = script.find_tool("cmake")
    if cmake is None or tensorrt_library.gpu_is_usable():
        pytest.skip("no cmake, or there is a GPU")
    try:
        compiler = f"-DCMAKE_CUDA_COMPILER={script.find_toolkit().nvcc}"
    except script.BuildError as error:
        pytest.skip(f"no CUDA toolkit: {error}")
    options = [compiler, "-DNMEXPORT_CUDA_ARCHITECTURES=native"]
    done = subprocess.run(
        [cmake, "-S", KERNELS_FOLDER, "-B", tmp_path, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    told = " ".join(done.stderr.split())
    assert "no GPU is found here; name compute capabilities instead, such as 80;90" in told


def test_the_ops_of_the_cuda_provider_under_sanitizers(tmp_path: Path):
    """On kernels and a runtime that only take notes: no GPU, no session."""
    script, hook = build_script(), build_hook()
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    try:
        options = {
            "ONNXRUNTIME_INCLUDE_DIR": hook.find_headers(ROOT),
            "cuda_include": script.find_toolkit().include,
            "CMAKE_BUILD_TYPE": "Debug",
            "NMEXPORT_SANITIZE": "ON",
            "NMEXPORT_WARNINGS_AS_ERRORS": "ON",
        }
    except (script.BuildError, hook.BuildError) as error:
        pytest.skip(f"no headers of ONNX Runtime or CUDA: {error}")
    configure(ROOT / "plugins", tmp_path, *(f"-D{name}={value}" for name, value in options.items()))
    build(tmp_path, "test_cuda_ops")
    assert "0 failures" in run_tool(tmp_path / "test_cuda_ops")
