"""One exported model on ONNX Runtime, on the CPU or a CUDA GPU, with its KV cache."""

from __future__ import annotations

import ctypes
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import onnxruntime
from nmexport import environment
from nmexport.environment import free_memory, physical_cores
from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.runtimes import native
from nmexport.runtimes.engine import Provider, read_engine
from nmexport.runtimes.feeds import float32_from, positions_from_mask
from nmexport.runtimes.native import HUGE_PAGES_ENTRY, THREADS_ENTRY
from nmexport.runtimes.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Side

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
"""The runtime's name in reports."""
_HOST = "cpu"
_PROVIDERS: Mapping[Provider, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # What a device lacks a kernel for falls to the CPU. No TF32: parity is judged in float32.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}
_RECORDING = [
    ("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"}),
    "CPUExecutionProvider",
]
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),  # NumPy has no name for it: the bits
}
# Element types as ONNX numbers them.
ONNX_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
# Passes that widen 16-bit weights to float32 once and for all, each by a way of its own.
_WIDENERS = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
_FATAL_ONLY = 4  # the runtime raises what goes wrong; its own log lines would say it twice

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
"""Configuration entry that says where the weights of a model given as bytes lie."""

SESSION_CONFIG: Mapping[str, str] = {
    # Dense and sparse sessions share the cores when they are measured side by side: a pool that
    # went on spinning after its run would be timed as the other one's slowness.
    "session.force_spinning_stop": "1",
}

HUGE_PAGES_SHARE = 0.25
"""Share of the free memory for weights copied into huge pages. Larger models stay mapped: a copy in
memory cannot be dropped and read again as pages of a file can."""


@dataclass(frozen=True, kw_only=True)
class OrtCache:
    """A KV cache after a run; no later run changes it."""

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
    element_bytes: int


def choose_provider(library: Path | None) -> Provider:
    """CUDA where ONNX Runtime has it, a GPU is here and the native library carries its kernels.

    Without those kernels each sparse linear would fall back to its function body, op by op.
    """
    if library is None or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "cpu"
    has_kernels = environment.probe().gpus and native.describe_library(library).get("cuda")
    return "cuda" if has_kernels else "cpu"


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
        options.add_session_config_entry(THREADS_ENTRY, str(options.intra_op_num_threads))
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
    native.check_opset(library)


def _refuse_other_version(path: Path) -> None:
    """Refuse a file whose ops are of another version of the contract: ours would misread them.

    Where the package onnx is missing, in a serving container, engine.json says the version.

    Raises:
        ArtifactError: if they are; a file that cannot be read is for ONNX Runtime to refuse.
    """
    try:
        import onnx

        from nmexport.graph.contract import check_version

        graph = onnx.load(path, load_external_data=False)
    except Exception:  # noqa: BLE001 - no package, or protobuf's own errors, by backend
        return
    check_version({entry.domain: entry.version for entry in graph.opset_import}, str(path))


def read_model(path: Path) -> bytes:
    """Read a model file whose weights lie in another folder.

    Raises:
        ArtifactError: if it is not there.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}.", fix="run `nmexport engine --force`"
        ) from error


def open_session(
    model: Path | bytes,
    options: onnxruntime.SessionOptions,
    provider: Provider = "cpu",
    *,
    bfloat16: bool = False,
    records_graphs: bool = False,
    folds_constants: bool = True,
) -> onnxruntime.InferenceSession:
    """Open a model file, or a serialised model.

    Args:
        model: The ONNX file or its bytes.
        options: Set for this model alone: a rewritten model adds its folder to them.
        provider: Where to compute.
        bfloat16: The model is in bfloat16. A CPU then runs it rewritten, with float32 between its
            weights: see `graph.cpu`.
        records_graphs: On CUDA, runs may be recorded as CUDA graphs and replayed.
        folds_constants: False computes in every run what could be computed once: weights that
            function bodies widen to float32 would else lie in the host's memory as such.

    Raises:
        ArtifactError: if the model is missing, corrupt, of another version of the op contract, or
            not runnable by this runtime.
        EnvironmentFault: if the provider does not work here.
    """
    name = "A graph made of the exported model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes) and not model.is_file():
        raise ArtifactError(f"{model} does not exist.", fix="run `nmexport export`")
    if not isinstance(model, bytes):
        _refuse_other_version(model)
    if provider == "cpu" and bfloat16:
        model = _widen(model, options)
    if provider == "cuda":
        _preload_cuda()
        if (library := native.find_library()) is not None:
            native.use_cuda_plans(library)
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=_RECORDING if records_graphs else _PROVIDERS[provider],
            disabled_optimizers=None if folds_constants else set(_WIDENERS),
        )
    except Exception as error:  # see _register
        raise ArtifactError(
            f"{name} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {error}",
            fix="run `nmexport export --force`; if it stays, the model needs an op or type "
            "that this runtime lacks",
        ) from error
    wanted = "CUDAExecutionProvider" if provider == "cuda" else "CPUExecutionProvider"
    if wanted not in session.get_providers():  # ONNX Runtime only warns and goes on without it
        raise EnvironmentFault(
            f"ONNX Runtime {onnxruntime.__version__} could not start {wanted}.",
            allowed=", ".join(onnxruntime.get_available_providers()),
            fix="install onnxruntime-gpu with the CUDA and cuDNN that it was built for, or build "
            "the engine again on the CPU",
        )
    return session


def _widen(model: Path | bytes, options: onnxruntime.SessionOptions) -> bytes:
    try:
        from nmexport.graph.cpu import widened
    except ImportError as error:
        raise EnvironmentFault(
            f"A bfloat16 model is rewritten for the CPU, which needs the package onnx: {error}",
            fix="pip install onnx, or serve a package that this version of nmexport made",
        ) from error
    if not isinstance(model, bytes):
        options.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(model.parent))
    return widened(model, has_native_ops=_has_native_ops(options))


def _has_native_ops(options: onnxruntime.SessionOptions) -> bool:
    """Tell whether `session_options` registered our library: only then is this entry set."""
    try:
        options.get_session_config_entry(THREADS_ENTRY)
    except RuntimeError:
        return False
    return True


def open_cuda_graph(
    model: bytes, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    """Open a serialised model whose runs, of one shape and one binding, replay a CUDA graph.

    Raises:
        EnvironmentFault: if the CUDA provider does not work here.
    """
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise EnvironmentFault(
            f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider.",
            allowed=", ".join(onnxruntime.get_available_providers()),
            fix="install onnxruntime-gpu in place of onnxruntime",
        )
    _preload_cuda()
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    return onnxruntime.InferenceSession(model, options, providers=[provider])


def provider_here(provider: Provider) -> Provider:
    """Return the provider, or the CPU with a warning where this ONNX Runtime lacks it."""
    if provider == "cpu" or "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return provider
    logging.getLogger(__name__).warning(
        "the model was made for a GPU, and ONNX Runtime %s has no CUDA provider: it runs on the "
        "CPU; install onnxruntime-gpu in place of onnxruntime for the GPU",
        onnxruntime.__version__,
    )
    return "cpu"


def _preload_cuda() -> None:
    """Load CUDA's libraries from Python packages, where ONNX Runtime can do that by itself."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        preload()


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
                element_type=ONNX_TYPES[value.type],
                element_bytes=NUMPY_TYPES[value.type].itemsize,
            )
        )
    return tuple(slots)


def _bits(value: Any) -> NDArray[np.uint16]:
    """Read a bfloat16 OrtValue on the host, which NumPy cannot, as 16-bit integers."""
    count = math.prod(value.shape())
    held = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.ctypeslib.as_array(held).reshape(value.shape())


def fits_huge_pages(folder: Path) -> bool:
    """Tell whether to copy the weights in a model's folder."""
    weights = sum(file.stat().st_size for file in folder.glob("*.data"))
    return weights <= HUGE_PAGES_SHARE * free_memory()


class OrtSession(Session):
    """A model on ONNX Runtime.

    Caches stay inside ONNX Runtime: what one run returns is bound as the next run's input, and
    never passes through NumPy.
    """

    runtime = RUNTIME
    exposes_cache = True
    cache: OrtCache | None = None

    def __init__(
        self,
        model: Path | bytes,
        *,
        library: Path | None = None,
        threads: int | None = None,
        config: Mapping[str, str] = SESSION_CONFIG,
        provider: Provider = "cpu",
        bfloat16: bool = False,
        folds_constants: bool = True,
    ) -> None:
        """Open the model.

        Args:
            model: The ONNX file with its external data next to it; or a serialised model, whose
                external data lies in the folder that `config` names under `EXTERNAL_DATA_FOLDER`.
            library: Native op library to register; None runs the function bodies in the file.
            threads: Intra-op threads; None takes the physical cores this process may use.
            config: ONNX Runtime session configuration entries. Without one about huge pages, the
                native library copies weights into them where they take a quarter of the free
                memory at most.
            provider: Where to compute.
            bfloat16: The model is in bfloat16, and not yet rewritten for a CPU.
            folds_constants: See `open_session`.

        Raises:
            EnvironmentFault: if the library is missing or does not load, or the provider does not
                work here.
            ArtifactError: if the model is missing or corrupt, or its cache has foreign names.
        """
        self.threads = threads or physical_cores()
        # An instrumented model runs too briefly to gain.
        copies = not isinstance(model, bytes) and fits_huge_pages(model.parent)
        pages = {HUGE_PAGES_ENTRY: "1" if copies else "0"}
        options = session_options(library=library, threads=self.threads, config={**pages, **config})
        self._device: Provider = provider
        self.on_gpu = provider == "cuda"
        self._session: onnxruntime.InferenceSession | None = open_session(
            model, options, provider, bfloat16=bfloat16, folds_constants=folds_constants
        )
        self._slots = _cache_slots(self._session)
        self._inputs = {value.name for value in self._session.get_inputs()}
        logits = {value.name: value for value in self._session.get_outputs()}.get("logits")
        if logits is None or not isinstance(logits.shape[2], int):
            raise ArtifactError("The model has no output logits [batch, sequence, vocabulary].")
        self._logits_type: str = logits.type
        self._vocabulary_size: int = logits.shape[2]
        self.watched: dict[str, NDArray[Any]] = {}
        """Outputs that `watch` asked for, from the last run."""
        self._watched_names: tuple[str, ...] = ()

    @classmethod
    def from_engine(cls, path: Path, *, side: Side = "sparse", elsewhere: bool = False) -> Self:
        """Open what `engine.json` describes.

        Args:
            path: `engine.json`, or the folder that holds it.
            side: Which model.
            elsewhere: Where this ONNX Runtime was built without the provider that the engine
                names, compute on the CPU; a warning says so.

        Raises:
            ArtifactError: see `read_engine`, `engine_library`.
            EnvironmentFault: if the native library that the engine needs is missing here.
        """
        engine = read_engine(path)
        provider = provider_here(engine.provider) if elsewhere else engine.provider
        model = engine.model_for(provider, side)
        rewritten = engine.needs_rewrite(provider, side)
        if model is None:
            raise ArtifactError(
                f"{path} has no {side} model.", fix="build it again without --no-dense-baseline"
            )
        return cls(
            model,
            # A baseline needs none, unless it is in bfloat16: see `graph.cpu`.
            library=native.engine_library(engine) if side != "dense" or rewritten else None,
            threads=engine.threads,
            config=engine.session_config,
            provider=provider,
            bfloat16=rewritten,
        )

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    @property
    def element_type(self) -> np.dtype[Any]:
        """T: the type of activations."""
        if self._logits_type == "tensor(bfloat16)":
            import ml_dtypes  # which a server does without

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        return NUMPY_TYPES[self._logits_type]

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache."""
        return sum(slot.heads * slot.head_dim * slot.element_bytes for slot in self._slots)

    def keep(self, cache: OrtCache) -> OrtCache:
        """See `Session`."""
        return cache

    def cache_values(self, cache: OrtCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """See `Session`."""
        for slot, value in zip(self._slots, cache.past, strict=True):
            is_bfloat16 = slot.element_type == ONNX_TYPES["tensor(bfloat16)"]
            elements = _bits(value) if is_bfloat16 and self._device == "cpu" else value.numpy()
            yield slot.present, float32_from(elements, is_bfloat16=is_bfloat16)

    def watch(self, names: Iterable[str]) -> None:
        """From now on keep these outputs of each run in `watched`, next to logits and cache."""
        self._watched_names = tuple(names)

    def extend(
        self,
        cache: OrtCache | None,
        input_ids: NDArray[np.int64],
        new_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], OrtCache]:
        """See `Session`.

        Args:
            cache: The cache, or None.
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            new_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens.
        """
        mask = np.ones_like(input_ids) if new_mask is None else new_mask
        if cache is None:
            past = self._empty_past(input_ids.shape[0])
        else:
            past = cache.past
            mask = np.concatenate([cache.mask, mask], axis=1)
        return self._run(past, input_ids, mask.astype(np.int64, copy=False))

    def close(self) -> None:
        """Free the model and its cache."""
        self.cache = None
        self._session = None

    def _empty_past(self, batch: int) -> tuple[Any, ...]:
        return tuple(
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [batch, slot.heads, 0, slot.head_dim], slot.element_type, self._device
            )
            for slot in self._slots
        )

    def _run(
        self, past: tuple[Any, ...], input_ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], OrtCache]:
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
        for slot, value in zip(self._slots, past, strict=True):
            binding.bind_ortvalue_input(slot.past, value)
        # The runtime writes the logits straight into our array: a prompt's are tens of megabytes.
        logits = np.empty(
            (batch, new_tokens, self._vocabulary_size),
            NUMPY_TYPES[self._logits_type],
        )
        binding.bind_output(
            "logits",
            _HOST,
            0,
            ONNX_TYPES[self._logits_type],
            list(logits.shape),
            logits.ctypes.data,
        )
        for slot in self._slots:
            binding.bind_output(slot.present, self._device)
        for name in self._watched_names:
            binding.bind_output(name, _HOST)
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[1:]
        extended = OrtCache(past=tuple(outputs[: len(self._slots)]), mask=mask)
        watched = outputs[len(self._slots) :]
        self.watched = {
            name: value.numpy() for name, value in zip(self._watched_names, watched, strict=True)
        }
        is_bfloat16 = self._logits_type == "tensor(bfloat16)"
        return float32_from(logits, is_bfloat16=is_bfloat16), extended
