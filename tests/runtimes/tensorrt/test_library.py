"""Reading a TensorRT engine's description, refusing what cannot run, opening, CUDA's calls."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.runtimes import opening
from nmexport.runtimes.engine import TensorRTEngine, read_engine
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt import requirements
from nmexport.runtimes.tensorrt.cuda_memory import CudaDevice
from nmexport.stages import engine as engine_stage
from nmexport.store.artifact import file_digest
from nmexport.store.records import json_from

from tests.support.served import TENSORRT_SECTION, engine_document, tensorrt_document

if TYPE_CHECKING:
    from pathlib import Path

ENGINE = TENSORRT_SECTION


def write(folder: Path, **changes: Any) -> Path:
    entries = tensorrt_document(**changes.pop("tensorrt", {}))
    document = engine_document(**{**entries, **changes})
    (folder / "engine.json").write_text(json.dumps(document))
    return folder


def read(path: Path) -> TensorRTEngine:
    described = read_engine(path).tensorrt
    assert described is not None
    return described


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that can run the engine; the path of its plugin library."""
    library = tmp_path / tensorrt_library.PLUGIN
    library.write_bytes(b"the plugin")
    monkeypatch.setattr(tensorrt_library, "_FOLDER", tmp_path)
    monkeypatch.setattr(tensorrt_library, "gpu_is_usable", lambda: True)
    monkeypatch.setattr(tensorrt_library, "compute_capability", lambda: "8.9")
    module = SimpleNamespace(__version__="1.7.1")
    monkeypatch.setattr(tensorrt_library, "load", lambda _: module)
    return library


def plugin(library: Path) -> dict[str, Any]:
    return {"plugin": {**ENGINE["plugin"], "sha256": file_digest(library)}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    described = read(write(tmp_path))
    assert described.profiles == ("prefill", "decode")
    assert json.loads(json.dumps(json_from(described))) == ENGINE
    assert read(tmp_path / "engine.json") == described


def test_a_description_without_tensors_is_read(tmp_path: Path) -> None:
    known = {name: value for name, value in ENGINE.items() if name != "tensors"}
    document = engine_document(**{**tensorrt_document(), "tensorrt": known})
    (tmp_path / "engine.json").write_text(json.dumps(document))
    assert read(tmp_path).tensors == ()


@pytest.mark.parametrize(
    "changes", [{"runtime": "onnxruntime"}, {"tensorrt": {"plugin": 3}}, {"tensorrt": {"odd": 1}}]
)
def test_foreign_descriptions_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        read(write(tmp_path, **changes))


def test_an_engine_that_fits_the_machine_runs(tmp_path: Path, machine: Path) -> None:
    assert requirements.why_not_runnable(read(write(tmp_path, tensorrt=plugin(machine)))) is None
    assert opening.why_not_here(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "1.6"}, r"built by tensorrt-rtx 1\.6; installed is 1\.7\.1"),
        ({"compute_capabilities": ["12.0"]}, r"compute capability 8\.9"),
        ({}, "another build of x.so"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, machine: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((EnvironmentFault, ArtifactError), match=said):
        requirements.check_runnable(read(write(tmp_path, tensorrt=changes)))


def test_an_embedded_plugin_needs_no_file(tmp_path: Path, machine: Path) -> None:
    machine.unlink()
    embedded = {"plugin": {**ENGINE["plugin"], "embedded": True}}
    described = read(write(tmp_path, tensorrt=embedded))
    assert requirements.engine_plugin(described) is None
    plain = read(write(tmp_path))
    with pytest.raises(EnvironmentFault, match=r"tensorrt/build\.py"):
        requirements.engine_plugin(plain)


def test_of_all_that_is_said_errors_are_kept_and_lines_go_to_listeners() -> None:
    messages, heard = tensorrt_library.Messages(), []
    messages.add("INFO: before")
    with messages.heard_by(heard.append):
        messages.add("INFO: one")
        messages.add("ERROR: two", error="two")
    messages.add("INFO: after")
    assert heard == ["INFO: one", "ERROR: two"]
    assert messages.errors_since(0) == ["two"]
    mark = messages.mark()
    assert messages.errors_since(mark) == []
    for number in range(1000):
        messages.add("ERROR", error=str(number))
    told = messages.errors_since(mark)
    assert (len(told), told[-1]) == (tensorrt_library._KEPT_ERRORS, "999")
    assert messages.errors_since(messages.mark() - 1) == ["999"]


def test_opening_says_what_is_wrong_with_the_description(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"engine\.json cannot be read"):
        opening.open_session(tmp_path)


def test_auto_takes_the_fastest_that_works(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_stage.resolve_target("auto") == "tensorrt"

    def only_rtx(target: str) -> Any:
        if target == "tensorrt":
            raise EnvironmentFault("not installed")
        return SimpleNamespace(__version__="1.7.1")

    monkeypatch.setattr(tensorrt_library, "load", only_rtx)
    assert engine_stage.resolve_target("auto") == "tensorrt-rtx"
    monkeypatch.setattr(tensorrt_library, "compute_capability", lambda: "9.0")
    assert engine_stage.resolve_target("auto") == "onnxruntime"
    monkeypatch.setattr(tensorrt_library, "gpu_is_usable", lambda: False)
    assert engine_stage.resolve_target("auto") == "onnxruntime"
    assert engine_stage.resolve_target("tensorrt") == "tensorrt"


# -- CUDA's calls -------------------------------------------------------------------------------


class FakeRuntime(ModuleType):
    """cuda.bindings.runtime that notes its calls; `failing` names one that fails."""

    cudaStreamNonBlocking = 1  # noqa: N815 (CUDA's name)
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down", cudaMemcpyDeviceToDevice="over"
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failing = ""
        self.answers = {
            "cudaStreamCreateWithFlags": (7,),
            "cudaMalloc": (4096,),
            "cudaStreamEndCapture": ("graph",),
            "cudaGraphInstantiate": ("executable",),
            "cudaGetErrorString": (b"out of memory",),
        }

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            return (2 if name == self.failing else 0, *self.answers.get(name, ()))

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    runtime = FakeRuntime()
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    bindings.runtime = runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    return runtime


def test_memory_is_zeroed_copied_and_freed(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    assert device.stream == 7
    buffer = device.allocate(64)
    array = np.zeros(8, np.int64)
    device.upload(array, buffer)
    device.download(buffer, array)
    device.copy(buffer, buffer, 64)
    copies = [arguments for name, arguments in cuda.calls if name == "cudaMemcpyAsync"]
    assert [kind for *_, kind, _ in copies] == ["up", "down", "over"]
    assert copies[0][:3] == (4096, array.ctypes.data, 64)
    assert ("cudaMemsetAsync", (4096, 0, 64, 7)) in cuda.calls
    assert cuda.names().count("cudaStreamSynchronize") == 1  # the download waits
    del buffer
    assert cuda.calls[-1] == ("cudaFree", (4096,))


def test_a_graph_is_recorded_launched_and_destroyed(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    graph = device.capture(lambda: cuda.calls.append(("work", ())))
    begun = cuda.names().index("cudaStreamBeginCapture")
    assert cuda.names()[begun : begun + 5] == [
        "cudaStreamBeginCapture",
        "work",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
    ]
    graph.launch()
    assert cuda.calls[-1] == ("cudaGraphLaunch", ("executable", 7))
    del graph
    assert cuda.calls[-1] == ("cudaGraphExecDestroy", ("executable",))


@pytest.mark.parametrize(
    ("failing", "last"),
    [("", "cudaGraphDestroy"), ("cudaStreamEndCapture", "cudaGetLastError")],
)
def test_a_capture_ends_whatever_happens(cuda: FakeRuntime, failing: str, last: str) -> None:
    def broken() -> None:
        raise ArtifactError("no")

    device = CudaDevice()
    cuda.failing = failing
    with pytest.raises(ArtifactError):
        device.capture(broken)
    assert cuda.names()[-2:] == ["cudaStreamEndCapture", last]


def test_a_graph_that_cannot_be_instantiated_is_destroyed(cuda: FakeRuntime) -> None:
    device = CudaDevice()
    cuda.failing = "cudaGraphInstantiate"
    with pytest.raises(EnvironmentFault, match="out of memory"):
        device.capture(lambda: None)
    assert cuda.names()[-1] == "cudaGraphDestroy"


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaSetDevice"])
def test_what_cuda_refuses_is_told_in_its_words(cuda: FakeRuntime, call: str) -> None:
    cuda.failing = call
    with pytest.raises(EnvironmentFault, match="out of memory"):
        CudaDevice().allocate(1)


def test_without_cuda_python_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EnvironmentFault, match="pip install cuda-bindings"):
        CudaDevice()
