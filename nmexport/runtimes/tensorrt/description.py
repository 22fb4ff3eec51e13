"""`engine.json` of a TensorRT engine: what was built, for what, and with which plugin."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.store.artifact import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.runtimes.tensorrt.library import TensorRTTarget

FILENAME = "engine.json"
SECTION = "tensorrt"
PLAN, DENSE_PLAN = "model.plan", "dense.plan"
_REBUILD = "run `nmexport engine` (or `nmexport build`) on this work directory again"


@dataclass(frozen=True, kw_only=True)
class PluginRecord:
    """The plugin library that an engine was built with."""

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
    """The part of `engine.json` that a TensorRT session reads."""

    target: TensorRTTarget
    version: str
    """Of TensorRT or TensorRT-RTX."""
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
    """What each optimisation profile is for, in the plan's order."""
    plugin: PluginRecord
    tensors: tuple[EngineTensor, ...] = ()
    """Of `model.plan`, as the builder saw them; none where an older build did not say."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def from_document(document: Mapping[str, Any]) -> TensorRTEngine:
    """Read the section of `engine.json`.

    Raises:
        KeyError, TypeError: if it is malformed.
    """
    section = dict(document[SECTION])
    section["plugin"] = PluginRecord(**section["plugin"])
    section["tensors"] = tuple(
        EngineTensor(**{**one, "shape": tuple(one["shape"])}) for one in section.get("tensors", ())
    )
    for name in ("compute_capabilities", "profiles"):
        section[name] = tuple(section[name])
    return TensorRTEngine(**section)


def read_tensorrt_engine(path: Path) -> TensorRTEngine:
    """Read an engine description.

    Args:
        path: `engine.json`, or the folder that holds it.

    Raises:
        ArtifactError: if it is missing, malformed, or of another runtime.
    """
    path = path if path.suffix == ".json" else path / FILENAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["runtime"] not in tensorrt_library.TARGETS:
            raise ArtifactError(
                f"{path} is an engine of {document['runtime']}.",
                allowed=" or ".join(tensorrt_library.TARGETS),
                fix=_REBUILD,
            )
        return from_document(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}", fix=_REBUILD) from error


def engine_plugin(engine: TensorRTEngine) -> Path | None:
    """The plugin library to load before the engine; None where the plan carries it.

    Raises:
        EnvironmentFault: if it is missing here.
        ArtifactError: if the library found is another one.
    """
    if engine.plugin.embedded:
        return None
    library = tensorrt_library.require_plugin()
    if file_digest(library) != engine.plugin.sha256:
        raise ArtifactError(
            f"The engine was built with another build of {engine.plugin.file} than {library}.",
            allowed=f"sha256 {engine.plugin.sha256}, version {engine.plugin.version}",
            fix=_REBUILD,
        )
    return library


def check_runnable(engine: TensorRTEngine) -> None:
    """Refuse an engine that this machine cannot run.

    Raises:
        EnvironmentFault: if there is no GPU, its runtime is missing or of another version, or the
            engine is for other GPUs.
        ArtifactError: see `engine_plugin`.
    """
    if not tensorrt_library.gpu_is_usable():
        raise EnvironmentFault(
            f"No NVIDIA GPU with its driver is here, and the engine is one of {engine.target}.",
            fix="run it on a machine with such a GPU, or build with --target onnxruntime",
        )
    module = tensorrt_library.load(engine.target)
    if module.__version__ != engine.version:
        raise EnvironmentFault(
            f"The engine was built by {engine.target} {engine.version}; installed is "
            f"{module.__version__}.",
            allowed=engine.version,
            fix=f"pip install {engine.target}=={engine.version}, or {_REBUILD}",
        )
    here = tensorrt_library.compute_capability()
    if engine.compute_capabilities and here not in engine.compute_capabilities:
        raise EnvironmentFault(
            f"This machine's GPU has compute capability {here}.",
            allowed=", ".join(engine.compute_capabilities),
            fix=f"build with --compute-capability {here}",
        )
    engine_plugin(engine)


def why_not_runnable(path: Path) -> str | None:
    """Why this machine cannot run an engine, in a sentence; None where it can.

    Raises:
        ArtifactError: if `engine.json` cannot be read.
    """
    engine = read_tensorrt_engine(path)
    try:
        check_runnable(engine)
    except (EnvironmentFault, ArtifactError) as fault:
        return fault.problem
    return None
