"""One exported model on ONNX Runtime's CPU provider, with its KV cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np

import onnxruntime
from nmexport.artifact import file_digest
from nmexport.environment import physical_cores
from nmexport.errors import ArtifactError, EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

ENGINE_SCHEMA = 1
RUNTIME = f"onnxruntime {onnxruntime.__version__}"
"""What runs the model, as reports name it."""
_REBUILD = "run `nmexport engine` (or `nmexport build`) on this work directory again"
_DEVICE = "cpu"
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),  # NumPy has no name for it: the bits
}
# Element types as ONNX numbers them.
_ONNX_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_FATAL_ONLY = 4  # the runtime raises what goes wrong; its own log lines would say it twice

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""Configuration entry that says where the weights of a model given as bytes lie."""

SESSION_CONFIG: Mapping[str, str] = {
    # Dense and sparse sessions share the cores when they are measured side by side: a pool that
    # went on spinning after its run would be timed as the other one's slowness.
    "session.force_spinning_stop": "1",
}


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """A KV cache as it stood after a run; holds references, copies nothing."""

    past: tuple[Any, ...]
    """One OrtValue `[B, H, P, D]` for each past input."""
    mask: NDArray[np.int64]
    """Attention mask `[B, P]`; 0 where a sequence is padded on the left."""


@dataclass(frozen=True, kw_only=True)
class _CacheSlot:
    """One past input and the present output that follows it."""

    past: str
    present: str
    heads: int
    head_dim: int
    element_type: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """`engine.json`, read back: what to open and how."""

    runtime: str
    runtime_version: str
    model: Path
    """The sparse model."""
    dense_model: Path
    threads: int | None
    session_config: Mapping[str, str]
    library_name: str | None
    """File name of the native op library, or None where the function bodies run."""
    library_digest: str | None


def read_engine(path: Path) -> Engine:
    """Read an engine description.

    Args:
        path: `engine.json`, or the folder that holds it.

    Raises:
        ArtifactError: if it is missing, malformed, of another schema, or names another runtime.
    """
    path = path if path.suffix == ".json" else path / "engine.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != ENGINE_SCHEMA or document["runtime"] != "onnxruntime":
            raise ArtifactError(
                f"{path} has schema {document['schema']} and runtime {document['runtime']}.",
                allowed=f"schema {ENGINE_SCHEMA}, runtime onnxruntime",
                fix=_REBUILD,
            )
        library = document["library"]
        return Engine(
            runtime=document["runtime"],
            runtime_version=document["runtime_version"],
            model=(path.parent / document["model"]).resolve(),
            dense_model=(path.parent / document["dense_model"]).resolve(),
            threads=document["threads"],
            session_config=document["session_config"],
            library_name=library["file"] if library else None,
            library_digest=library["sha256"] if library else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}", fix=_REBUILD) from error


def engine_library(engine: Engine) -> Path | None:
    """The native library that an engine was made with.

    Raises:
        EnvironmentFault: if this machine has no native library and the engine needs it.
        ArtifactError: if the library found is another one.
    """
    if engine.library_digest is None:
        return None
    from nmexport.runtimes.native import require_library

    library = require_library()
    if file_digest(library) != engine.library_digest:
        raise ArtifactError(
            f"The engine was made with another build of {engine.library_name} than {library}.",
            allowed=f"sha256 {engine.library_digest}",
            fix=_REBUILD,
        )
    return library


def session_options(
    *, library: Path | None, threads: int | None, config: Mapping[str, str] = SESSION_CONFIG
) -> onnxruntime.SessionOptions:
    """Options that every session here opens with: quiet, deterministic, own pool.

    Raises:
        EnvironmentFault: if the native op library is missing or does not load.
    """
    # Device discovery warns on the process-wide logger before any session exists.
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    if library is not None:
        _register(options, library)
    return options


def _register(options: onnxruntime.SessionOptions, library: Path) -> None:
    fix = "`nmexport doctor` says how to build it; without it the function bodies run (slower)"
    if not library.is_file():
        raise EnvironmentFault(f"Native op library {library} does not exist.", fix=fix)
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # the binding raises its own classes, outside any public module
        raise EnvironmentFault(
            f"Native op library {library} does not load in ONNX Runtime "
            f"{onnxruntime.__version__}: {error}",
            fix=fix,
        ) from error


def open_session(
    model: Path | bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """Open a model file, or a serialised model.

    Raises:
        ArtifactError: if the model is missing, corrupt, or not runnable by this runtime.
    """
    name = "An instrumented copy of the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not model.is_file():
        raise ArtifactError(f"{model} does not exist.", fix="run `nmexport export`")
    try:
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # see _register
        raise ArtifactError(
            f"{name} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {error}",
            fix="run `nmexport export --force export`; if it stays, the model needs an op or type "
            "that this runtime lacks",
        ) from error


def _cache_slots(session: onnxruntime.InferenceSession) -> tuple[_CacheSlot, ...]:
    outputs = {value.name for value in session.get_outputs()}
    slots = []
    for value in session.get_inputs():
        if not value.name.startswith("past_key_values."):
            continue
        present = value.name.replace("past_key_values.", "present.", 1)
        heads, head_dim = value.shape[1], value.shape[3]
        if present not in outputs or not isinstance(heads, int) or not isinstance(head_dim, int):
            raise ArtifactError(
                f"Cache input {value.name} has shape {value.shape} and no match among the outputs.",
                allowed="past_key_values.{i}.key|value [batch, heads, past, head_dim] with "
                "present.{i}.key|value",
            )
        slots.append(
            _CacheSlot(
                past=value.name,
                present=present,
                heads=heads,
                head_dim=head_dim,
                element_type=_ONNX_TYPES[value.type],
            )
        )
    return tuple(slots)


def _float32_from(buffer: NDArray[Any], onnx_type: str) -> NDArray[np.float32]:
    if onnx_type == "tensor(bfloat16)":  # the upper half of a float32
        widened = buffer.astype(np.uint32) << np.uint32(16)
        return cast("NDArray[np.float32]", widened.view(np.float32))
    return buffer.astype(np.float32, copy=False)


def positions_from_mask(mask: NDArray[np.int64], new_tokens: int) -> NDArray[np.int64]:
    """Position ids of the last `new_tokens` columns, `[B, S]`, counted from the first real token.

    Args:
        mask: Attention mask `[B, P + S]`; 0 marks padding on the left.
        new_tokens: S.
    """
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return np.ascontiguousarray(positions[:, mask.shape[1] - new_tokens :])


class OrtSession:
    """A model with its KV cache; implements `runtimes.session.Session`.

    The cache stays inside ONNX Runtime: what one run gives out is bound as the next run's input,
    never passing through NumPy. Not shared between threads.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        library: Path | None = None,
        threads: int | None = None,
        config: Mapping[str, str] = SESSION_CONFIG,
    ) -> None:
        """Open the model.

        Args:
            model: The ONNX file, its external data beside it; or a serialised model, whose external
                data lies in the folder that `config` names under `EXTERNAL_DATA_FOLDER`.
            library: Native op library to register; None runs the function bodies in the file.
            threads: Intra-op threads; None takes the physical cores this process may use.
            config: ONNX Runtime session configuration entries.

        Raises:
            EnvironmentFault: if the library is missing or does not load.
            ArtifactError: if the model is missing or corrupt, or its cache has foreign names.
        """
        self.threads = threads or physical_cores()
        options = session_options(library=library, threads=self.threads, config=config)
        self._session: onnxruntime.InferenceSession | None = open_session(model, options)
        self._slots = _cache_slots(self._session)
        self._inputs = {value.name for value in self._session.get_inputs()}
        logits = {value.name: value for value in self._session.get_outputs()}.get("logits")
        if logits is None or not isinstance(logits.shape[2], int):
            raise ArtifactError("The model has no output logits [batch, sequence, vocabulary].")
        self._logits_type: str = logits.type
        self._vocabulary_size: int = logits.shape[2]
        self._state: CacheState | None = None
        self.watched: dict[str, NDArray[Any]] = {}
        """Outputs that `watch` asked for, from the last run."""
        self._watched_names: tuple[str, ...] = ()

    @classmethod
    def from_engine(cls, path: Path, *, dense: bool = False) -> Self:
        """Open what `engine.json` describes.

        Args:
            path: `engine.json`, or the folder that holds it.
            dense: Open the dense baseline in place of the sparse model.

        Raises:
            ArtifactError: see `read_engine`, `engine_library`.
            EnvironmentFault: if the native library that the engine needs is missing here.
        """
        engine = read_engine(path)
        return cls(
            engine.dense_model if dense else engine.model,
            library=None if dense else engine_library(engine),
            threads=engine.threads,
            config=engine.session_config,
        )

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    @property
    def state(self) -> CacheState:
        """The cache as it stands; give it to `restore` to decode from here again.

        Raises:
            RuntimeError: if nothing has run yet.
        """
        if self._state is None:
            raise RuntimeError("decode_step or state before the first prefill")
        return self._state

    def restore(self, state: CacheState) -> None:
        """Continue from a state that this session gave out before."""
        self._state = state

    def watch(self, names: Iterable[str]) -> None:
        """From now on keep these outputs of each run in `watched`, beside logits and cache."""
        self._watched_names = tuple(names)

    def prefill(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Drop the cache, run whole prompts, and return logits `[B, S, V]`.

        Args:
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            attention_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens.
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._state = CacheState(past=self._empty_past(input_ids.shape[0]), mask=mask[:, :0])
        return self._run(input_ids, mask.astype(np.int64, copy=False))

    def decode_step(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one more token a sequence, `[B, 1]`, on the cache, and return logits `[B, 1, V]`."""
        mask = np.concatenate([self.state.mask, np.ones_like(input_ids)], axis=1)
        return self._run(input_ids, mask)

    def close(self) -> None:
        """Free the model and its cache."""
        self._state = None
        self._session = None

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _empty_past(self, batch: int) -> tuple[Any, ...]:
        return tuple(
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [batch, slot.heads, 0, slot.head_dim], slot.element_type, _DEVICE
            )
            for slot in self._slots
        )

    def _run(self, input_ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run S new tokens after the cached ones; `mask` `[B, P + S]` covers both."""
        session = self._session
        if session is None:
            raise RuntimeError("the session is closed")
        batch, new_tokens = input_ids.shape
        feeds = {
            "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
            "attention_mask": np.ascontiguousarray(mask),
            "position_ids": positions_from_mask(mask, new_tokens),
        }
        binding = session.io_binding()
        for name, array in feeds.items():
            if name in self._inputs:  # a model without positions of its own has no such input
                binding.bind_cpu_input(name, array)
        for slot, past in zip(self._slots, self.state.past, strict=True):
            binding.bind_ortvalue_input(slot.past, past)
        # The runtime writes the logits straight into our array: a prompt's are tens of megabytes.
        logits = np.empty(
            (batch, new_tokens, self._vocabulary_size),
            _NUMPY_TYPES[self._logits_type],
        )
        binding.bind_output(
            "logits",
            _DEVICE,
            0,
            _ONNX_TYPES[self._logits_type],
            list(logits.shape),
            logits.ctypes.data,
        )
        for slot in self._slots:
            binding.bind_output(slot.present, _DEVICE)
        for name in self._watched_names:
            binding.bind_output(name, _DEVICE)
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[1:]
        self._state = CacheState(past=tuple(outputs[: len(self._slots)]), mask=mask)
        watched = outputs[len(self._slots) :]
        self.watched = {
            name: value.numpy() for name, value in zip(self._watched_names, watched, strict=True)
        }
        return _float32_from(logits, self._logits_type)
