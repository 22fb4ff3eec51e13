"""Opens models in ONNX Runtime: providers, session options, the native library."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

import onnxruntime
from nmexport import environment
from nmexport.environment import free_memory, physical_cores
from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.runtimes import native
from nmexport.runtimes.native import THREADS_ENTRY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.runtimes.engine import Provider

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
"""The runtime's name in reports."""
_PROVIDERS: Mapping[Provider, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    # Nodes without a CUDA kernel run on the CPU. No TF32: parity is judged in float32.
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


def choose_provider(library: Path | None) -> Provider:
    """Choose CUDA where ONNX Runtime has it, a GPU is here and the library carries our kernels.

    Without those kernels each sparse linear would fall back to its function body, op by op.
    """
    if library is None or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "cpu"
    has_kernels = environment.probe().gpus and native.describe_library(library).get("cuda")
    return "cuda" if has_kernels else "cpu"


def session_options(
    *, library: Path | None, threads: int | None, config: Mapping[str, str] = SESSION_CONFIG
) -> onnxruntime.SessionOptions:
    """Make the options that every session here opens with: quiet, deterministic, own pool.

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


def open_inference_session(
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
        from nmexport.graph.cpu import widen_file
    except ImportError as error:
        raise EnvironmentFault(
            f"A bfloat16 model is rewritten for the CPU, which needs the package onnx: {error}",
            fix="pip install onnx, or serve a package that this version of nmexport made",
        ) from error
    if not isinstance(model, bytes):
        options.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(model.parent))
    return widen_file(model, has_native_ops=_has_native_ops(options))


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


def fits_huge_pages(folder: Path) -> bool:
    """Tell whether to copy the weights in a model's folder."""
    weights = sum(file.stat().st_size for file in folder.glob("*.data"))
    return weights <= HUGE_PAGES_SHARE * free_memory()
