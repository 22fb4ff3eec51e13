"""A wheel for others: its tag, what it needs, and that it works where there is no compiler."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.runtimes import native
from nmexport.store.artifact import file_digest

from tests.support.op_cases import (
    STORED,
    LinearCase,
    linear_calls,
    one_node_model,
    run_session,
    session_of,
    stored_calls,
)
from tests.support.plugin_build import ROOT, load_script, run_tool
from tests.support.tiny import save_tiny_model, tiny_config

MACHINE = platform.machine()
# Of the C library alone: neither of a C++ library nor of a compiler's own.
ALLOWED = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2"}
FAST = "--pattern 8:16 --criterion act --mitigation none --calib-samples 4 --calib-length 32"
SHORT = "--eval-windows 2 --eval-length 32"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = load_script(ROOT / "plugins" / "wheel.py")
    if any(importlib.util.find_spec(name) is None for name in made._NEEDED):
        pytest.skip("no ziglang or no auditwheel: make wheel installs them")
    if MACHINE not in made.MACHINES:
        pytest.skip(f"no wheel for {MACHINE}")
    (path,) = made.build_wheels([MACHINE], tmp_path_factory.mktemp("wheel"))
    return Path(path)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel and this environment's packages, but not its nmexport."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "packages.pth").write_text("\n".join(packages))
    return folder / "bin" / "python"


def run(python: Path, *words: str) -> str:
    """Run nmexport where only the environment's own programs are found: no compiler."""
    done = subprocess.run(
        [str(python), "-m", "nmexport", *words],
        cwd=python.parent,
        env={"PATH": str(python.parent), "HOME": str(python.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tag_is_one_that_auditwheel_grants(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-manylinux_2_28_{MACHINE}.whl")
    shown = run_tool(sys.executable, "-m", "auditwheel", "show", wheel)
    granted = re.search(rf'tag: "manylinux_2_(\d+)_{MACHINE}"', shown)
    assert granted is not None, shown
    assert int(granted[1]) <= 28


@pytest.mark.slow
def test_the_library_needs_the_c_library_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        natives = [name for name in packed.namelist() if re.search("_native/.", name)]
        assert natives == [f"nmexport/_native/{native.library_name()}"]
        library = packed.extract(natives[0], tmp_path)
    needed = re.findall(r"NEEDED.*\[(.+)\]", run_tool("readelf", "-d", library))
    assert set(needed) <= ALLOWED
    exported = run_tool("nm", "-D", "--defined-only", library).splitlines()
    names = {line.split()[-1] for line in exported}
    assert "RegisterCustomOps" in names
    assert all(name == "RegisterCustomOps" or name.startswith("nmexport_") for name in names)


@pytest.mark.slow
def test_a_model_is_built_with_the_native_op_where_no_compiler_is(
    python: Path, tmp_path: Path
) -> None:
    found = json.loads(run(python, "doctor", "--json"))
    library = found["native_library"]
    assert found["compiler"] is None
    assert library["why_missing"] is None
    assert Path(library["path"]).is_relative_to(python.parent.parent)
    assert "native op library" not in run(python, "doctor")
    save_tiny_model(tmp_path / "model", "llama", **tiny_config("llama"))
    work = tmp_path / "work"
    options = ["--model", str(tmp_path / "model"), "--work", str(work)]
    run(python, "build", *options, *FAST.split(), *SHORT.split())
    engine = work / "engine" / "current" / "engine.json"
    described: dict[str, Any] = json.loads(engine.read_text(encoding="utf-8"))
    assert described["library"]["sha256"] == file_digest(Path(library["path"]))


def bits(case: LinearCase, library: Path, variant: str) -> np.ndarray[Any, Any]:
    assert native.use_variant(library, variant)
    model = one_node_model(case.node(), case.x, case.arrays)
    y = run_session(session_of(model, library=library), case.x)
    return y.view(f"u{y.dtype.itemsize}")


@pytest.fixture(scope="module")
def libraries(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The one that this machine's compiler made, and the wheel's."""
    local = native.find_library()
    if local is None:
        pytest.skip("the native library is not built here")
    with zipfile.ZipFile(wheel) as packed:
        name = f"nmexport/_native/{native.library_name()}"
        return local, Path(packed.extract(name, tmp_path_factory.mktemp("library")))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["avx512", "avx2", "neon", "portable"])
def test_another_compiler_changes_no_bit(variant: str, libraries: tuple[Path, Path]) -> None:
    before = [native.describe_library(library)["variant"] for library in libraries]
    assert before[0] == before[1]  # the fastest that this processor has
    found = [native.use_variant(library, variant) for library in libraries]
    assert found[0] == found[1]
    if not all(found):
        pytest.skip("this processor has no such instructions")

    @settings(max_examples=40, deadline=None, database=None)
    @given(case=st.one_of(linear_calls(), stored_calls()))
    def check(case: LinearCase) -> None:
        if case.arrays["W"].dtype == STORED[3]:  # which the library refuses
            return
        ours, theirs = (bits(case, library, variant) for library in libraries)
        np.testing.assert_array_equal(theirs, ours)

    try:
        check()
    finally:
        for library, name in zip(libraries, before, strict=True):
            native.use_variant(library, name)
