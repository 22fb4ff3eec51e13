"""`engine.json`: what an engine is and how it runs; read and written here alone.

Whatever the target, the description says how the exported ONNX files run on ONNX Runtime: that is
what a machine falls back to which cannot run the plan. A TensorRT engine adds a section of its own.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003  records are read by their annotations
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003
from typing import Literal

from nmexport.store.records import read_record, write_record

FILENAME = "engine.json"
SCHEMA = 3
PLAN, DENSE_PLAN = "model.plan", "dense.plan"

Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
TensorRTTarget = Literal["tensorrt", "tensorrt-rtx"]
Provider = Literal["cpu", "cuda"]
"""Device of ONNX Runtime; the cache is in its memory too."""
ElementType = Literal["float32", "float16", "bfloat16"]

Side = Literal["sparse", "dense", "stored"]
"""The sparse model, the dense baseline, or the dense model in the sparse one's integers."""

REBUILD = "run `nmexport engine` (or `nmexport build`) on this work directory again"


@dataclass(frozen=True, kw_only=True)
class LibraryRecord:
    """The native library that an engine was made with."""

    file: Path
    """Next to `engine.json`, where it travels with it; otherwise only the name is of use."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """The TensorRT plugin library that a plan was built with."""

    file: str
    sha256: str
    version: str
    embedded: bool
    """It is in the plan; no file is needed."""


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """An input or output of a plan."""

    name: str
    element: str
    """TensorRT's name of its type, such as `HALF`."""
    shape: tuple[int, ...]
    """-1 is a dynamic axis."""
    is_input: bool


@dataclass(frozen=True, kw_only=True)
class TensorRTEngine:
    """Everything a TensorRT session must know of its plans."""

    target: TensorRTTarget
    version: str
    """The version of TensorRT or TensorRT-RTX that built it."""
    dtype: str
    compute_capabilities: tuple[str, ...]
    """GPUs that the engine is for; none is the kind of GPU that it was built on."""
    in_place_cache: bool
    """`past` and `present` are one buffer of `max_context` tokens; otherwise the cache is copied to
    a longer one in every run."""
    why_not_in_place: str | None
    attention: str
    """`fused`: the engine has a fused kernel for every attention layer; `attention layers`: the
    runtime was given such layers, and what it made of them could not be read; `elementary`:
    products and a softmax."""
    max_batch: int
    max_sequence: int
    max_context: int
    profiles: tuple[str, ...]
    """Purpose of each optimization profile, in the plan's order."""
    plugin: PluginRecord
    tensors: tuple[EngineTensor, ...] = ()
    """Inputs and outputs of `model.plan`, as the builder saw them."""


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """Results of a TensorRT build, for the report; no session reads them."""

    attention_layers: int
    attention_kernels: Mapping[str, int]
    """Fused attention kernels by name."""
    plan_bytes: Mapping[str, int]
    """Size of the plan by side: `sparse`, `dense`."""
    weight_bytes: int
    timing_cache: str | None
    why_no_timing_cache: str | None


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """The exported models, rewritten for one provider; weights stay with the exported ones."""

    model: Path
    dense_model: Path | None
    stored_model: Path | None = None
    """See `Engine.stored_model`."""
    positions: int
    """Tokens of a sequence that they cover."""

    def of(self, side: Side) -> Path | None:
        """The graph of a side; None where there is none."""
        return _of_side(side, self.model, self.dense_model, self.stored_model)


@dataclass(frozen=True, kw_only=True)
class CudaGraphs(_Graphs):
    """The models as ONNX Runtime's CUDA provider runs them fastest; see `graph.cuda`."""


@dataclass(frozen=True, kw_only=True)
class StepGraphs(_Graphs):
    """The models as a CPU runs steps of many sequences; see `graph.shared_step`."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine, in memory with absolute paths; the file has them relative to its own folder."""

    runtime: Runtime
    runtime_version: str | None
    model: Path
    """The sparse model."""
    dense_model: Path | None
    """The baseline; None where the recipe leaves it out."""
    stored_model: Path | None = None
    """The dense model in the sparse one's integers; None where weights are float, or without a
    baseline."""
    cpu_model: Path | None = None
    """The sparse model as a CPU runs it, where a package has it ready."""
    cuda: CudaGraphs | None = None
    """None where the provider is the CPU, or a graph has a form that has no faster one."""
    why_no_cuda: str | None = None
    """Why a CUDA engine runs the exported files as they are."""
    shared_step: StepGraphs | None = None
    """None where a GPU computes, or a graph has a form that no shared step takes."""
    why_no_shared_step: str | None = None
    """Why a CPU engine runs requests one by one."""
    element_type: ElementType
    """Type of the models' logits and caches."""
    threads: int | None
    provider: Provider
    session_config: Mapping[str, str]
    library: LibraryRecord | None
    """The native op library; None where the function bodies run."""
    why_no_library: str | None = None
    tensorrt: TensorRTEngine | None = None
    """None where ONNX Runtime is the target."""
    build: BuildRecord | None = None

    def __post_init__(self) -> None:
        """Refuse a target without its section, or with another's."""
        section = "onnxruntime" if self.tensorrt is None else self.tensorrt.target
        if section != self.runtime:
            raise ValueError(f"runtime is {self.runtime!r}, and the section is one of {section}")

    @property
    def bundled_library(self) -> Path | None:
        """The library next to `engine.json`, where it travels with it."""
        return self.library.file if self.library and self.library.file.is_file() else None

    def exported(self, side: Side) -> Path | None:
        """The exported file of a side; None where there is none."""
        return _of_side(side, self.model, self.dense_model, self.stored_model)

    def model_for(self, provider: Provider, side: Side = "sparse") -> Path | None:
        """The file to open; None for a side that was not built."""
        is_ready = side == "sparse" and provider == "cpu" and self.cpu_model is not None
        return self.cpu_model if is_ready else self.exported(side)

    def needs_rewrite(self, provider: Provider, side: Side = "sparse") -> bool:
        """Tell whether the file to open has yet to be rewritten for a CPU; see `graph.cpu`."""
        is_ready = self.cpu_model is not None and side == "sparse"
        return provider == "cpu" and self.element_type == "bfloat16" and not is_ready


def _of_side(side: Side, sparse: Path, dense: Path | None, stored: Path | None) -> Path | None:
    return {"sparse": sparse, "dense": dense, "stored": stored}[side]


def read_engine(path: Path) -> Engine:
    """Read an engine description.

    Args:
        path: `engine.json`, or the folder that holds it.

    Raises:
        ArtifactError: if it is missing, malformed or of another schema.
    """
    path = path if path.suffix == ".json" else path / FILENAME
    return read_record(Engine, path, schema=SCHEMA, fix=REBUILD)


def write_engine(engine: Engine, folder: Path) -> None:
    """Write `engine.json` into a folder."""
    write_record(engine, folder / FILENAME, schema=SCHEMA)
