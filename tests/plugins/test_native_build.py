"""The native library's build: with a compiler, without one, without headers; and finding it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from nmexport.errors import EnvironmentFault
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_opening import session_options

from tests.support.plugin_build import load_script

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"


@pytest.fixture
def hook_module():
    pytest.importorskip("hatchling")
    return load_script(PLUGINS / "build_hook.py")


@pytest.fixture
def fetcher():
    return load_script(PLUGINS / "onnxruntime/fetch_headers.py")


def hook_in(module, root, warnings, target="wheel"):
    hook = module.NativeBuildHook(
        str(root),
        {},
        SimpleNamespace(),
        SimpleNamespace(version="1.2.3"),
        str(root / "dist"),
        target,
        SimpleNamespace(display_warning=warnings.append),
    )
    (root / "nmexport").mkdir(exist_ok=True)
    return hook


def test_without_a_compiler_the_build_goes_on_and_says_why(hook_module, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(hook_module.shutil, "which", lambda _: None)
    warnings, build_data = [], {}
    hook_in(hook_module, tmp_path, warnings).initialize("standard", build_data)
    assert "no C++ compiler" in warnings[0]
    assert build_data == {}  # the wheel stays a pure one
    folder = tmp_path / "nmexport/_native"
    assert native.find_library(folder) is None
    assert "no C++ compiler" in (native.why_missing(folder) or "")
    with pytest.raises(EnvironmentFault, match=r"no C\+\+ compiler") as fault:
        native.require_library(folder)
    assert fault.value.fix


def test_a_failed_build_leaves_no_library_of_an_earlier_one(hook_module, tmp_path, monkeypatch):
    hook = hook_in(hook_module, tmp_path, [])
    stale = tmp_path / "nmexport/_native" / native.library_name()
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    monkeypatch.setenv(hook_module.INCLUDE_VARIABLE, str(tmp_path))
    hook.initialize("editable", {})
    assert not stale.exists()
    assert hook_module.INCLUDE_VARIABLE in (native.why_missing(stale.parent) or "")


def test_a_built_library_makes_the_wheel_one_of_this_platform(hook_module, tmp_path, monkeypatch):
    def build(_root, destination, version, machine):
        assert (version, machine) == ("1.2.3", None)
        (destination / native.library_name()).write_bytes(b"library")

    monkeypatch.setattr(hook_module, "build_library", build)
    build_data = {}
    hook_in(hook_module, tmp_path, []).initialize("standard", build_data)
    assert build_data["pure_python"] is False
    assert build_data["tag"].startswith("py3-none-")
    assert "-any" not in build_data["tag"]
    assert native.find_library(tmp_path / "nmexport/_native") is not None


def test_a_wheel_for_others_says_its_processor(hook_module, tmp_path, monkeypatch):
    built = []
    monkeypatch.setenv(hook_module.MACHINE_VARIABLE, "aarch64")
    monkeypatch.setattr(hook_module, "build_library", lambda *given: built.append(given[-1]))
    build_data = {}
    hook_in(hook_module, tmp_path, []).initialize("standard", build_data)
    assert built == ["aarch64"]
    assert build_data == {"pure_python": False, "tag": "py3-none-linux_aarch64"}


@pytest.mark.parametrize(
    ("machine", "says"), [("riscv64", "riscv64 is none of x86_64"), ("x86_64", "pip install zig")]
)
def test_a_wheel_for_others_is_none_without_its_library(
    hook_module, tmp_path, monkeypatch, machine, says
):
    monkeypatch.setenv(hook_module.MACHINE_VARIABLE, machine)
    monkeypatch.setattr(hook_module.importlib.util, "find_spec", lambda _: None)
    hook = hook_in(hook_module, tmp_path, [])
    monkeypatch.setattr(hook_module.shutil, "which", lambda _: None)
    assert hook.dependencies() == ["cmake", "ninja", "ziglang"]
    with pytest.raises(hook_module.BuildError, match=says):
        hook.initialize("standard", {})


def test_a_source_distribution_builds_nothing(hook_module, tmp_path):
    hook = hook_in(hook_module, tmp_path, [], target="sdist")
    hook.initialize("standard", {})
    assert hook.dependencies() == []
    assert not (tmp_path / "nmexport/_native").exists()


def test_build_tools_are_asked_for_only_where_they_are_missing(hook_module, tmp_path, monkeypatch):
    hook = hook_in(hook_module, tmp_path, [])
    monkeypatch.setattr(hook_module.shutil, "which", lambda tool: tool if tool == "ninja" else None)
    assert hook.dependencies() == ["cmake"]


def test_named_headers_win_and_must_be_there(hook_module, tmp_path, monkeypatch):
    monkeypatch.setenv(hook_module.INCLUDE_VARIABLE, str(tmp_path))
    with pytest.raises(hook_module.BuildError, match=r"holds no onnxruntime_c_api\.h"):
        hook_module.find_headers(ROOT)
    (tmp_path / "onnxruntime_c_api.h").touch()
    assert hook_module.find_headers(ROOT) == tmp_path


def test_headers_that_cannot_be_had_are_an_error_with_the_mend(hook_module, tmp_path, monkeypatch):
    class NoHeaders:
        class FetchError(Exception):
            pass

        def fetch(self, folder):
            raise self.FetchError(f"no network for {folder}")

    monkeypatch.delenv(hook_module.INCLUDE_VARIABLE, raising=False)
    monkeypatch.setattr(hook_module, "_SYSTEM_INCLUDES", ())
    monkeypatch.setattr(hook_module, "_load_fetcher", lambda _: NoHeaders())
    with pytest.raises(hook_module.BuildError, match=r"no network.*NMEXPORT_ORT_INCLUDE"):
        hook_module.find_headers(tmp_path)


def test_cuda_kernels_are_built_only_where_asked_for(hook_module, monkeypatch):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(hook_module.shutil, "which", lambda name: f"/bin/{name}")
    assert hook_module.cuda_options("") == hook_module.cuda_options("0") == []
    assert hook_module.cuda_options("1") == ["-DNMEXPORT_CUDA=ON"]
    for wanted in ("80;90", "native"):
        assert hook_module.cuda_options(wanted)[1] == f"-DNMEXPORT_CUDA_ARCHITECTURES={wanted}"
    with pytest.raises(hook_module.BuildError, match="yes is none of 0, 1"):
        hook_module.cuda_options("yes")
    monkeypatch.setattr(hook_module.shutil, "which", lambda _: None)
    with pytest.raises(hook_module.BuildError, match="needs nvcc"):
        hook_module.cuda_options("1")


@pytest.mark.parametrize(("wanted", "minutes"), [("", 20), ("1", 120)])
def test_cuda_kernels_have_the_time_that_they_take(
    hook_module, tmp_path, monkeypatch, wanted, minutes
):
    limits = {}

    def run(command, *, timeout, **_):
        limits[command[1]] = timeout
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv(hook_module.CUDA_VARIABLE, wanted)
    monkeypatch.setattr(hook_module.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(hook_module.subprocess, "run", run)
    monkeypatch.setattr(hook_module, "find_headers", lambda root: root)
    hook_module.build_library(tmp_path, tmp_path / "native", "1.2.3")
    assert limits == {"-S": 1200, "--build": 60 * minutes, "--install": 1200}


def test_fetched_headers_are_not_fetched_again(fetcher, tmp_path, monkeypatch):
    include = tmp_path / "usr/include/onnxruntime"
    include.mkdir(parents=True)
    (include / fetcher.HEADER).touch()
    monkeypatch.setattr(fetcher, "_run", lambda *_: pytest.fail("nothing should run"))
    assert fetcher.fetch(tmp_path) == include


def test_sources_are_copied_with_the_suite_replaced(fetcher, tmp_path, monkeypatch):
    monkeypatch.setattr(fetcher, "_codename", lambda: "bookworm")
    source = tmp_path / "debian.sources"
    source.write_text("URIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\n")
    other = tmp_path / "node.list"
    other.write_text("deb https://example.org/node nodistro main\n")
    copies = tmp_path / "copies"
    copies.mkdir()
    assert fetcher._copy_source(source, copies)
    assert not fetcher._copy_source(other, copies)
    copied = (copies / "debian.sources").read_text()
    assert "Suites: trixie trixie-updates" in copied
    assert [path.name for path in copies.iterdir()] == ["debian.sources"]


def test_a_missing_tool_is_named(fetcher, tmp_path, monkeypatch):
    monkeypatch.setattr(fetcher.shutil, "which", lambda _: None)
    with pytest.raises(fetcher.FetchError, match="apt-get is not installed"):
        fetcher.fetch(tmp_path / "headers")


def test_a_package_without_a_build_record_says_so(tmp_path):
    assert "no build record" in (native.why_missing(tmp_path) or "")
    assert native.find_library(tmp_path) is None


def test_what_is_no_library_of_ours_is_refused(tmp_path):
    path = tmp_path / native.library_name()
    path.write_bytes(b"not a library")
    assert native.why_missing(tmp_path) is None
    assert native.find_library(tmp_path) == path
    with pytest.raises(EnvironmentFault, match="cannot be loaded"):
        native.describe_library(path)


@pytest.mark.skipif(native.find_library() is None, reason="no native library")
def test_a_library_of_another_version_of_the_contract_is_refused(monkeypatch):
    library = native.require_library()
    native.check_opset(library)
    described = native.describe_library(library)
    monkeypatch.setattr(native, "describe_library", lambda _: {**described, "opset_version": 1})
    with pytest.raises(EnvironmentFault, match="is of version 1 of the op contract") as fault:
        session_options(library=library, threads=1)
    assert fault.value.allowed == "version 2"
    assert "pip install" in fault.value.fix
