"""A graph made for the CUDA provider, open: how its runs are bound, started and awaited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import onnxruntime
from nmexport.environment import free_memory
from nmexport.errors import ArtifactError
from nmexport.runtimes.device_cache import (
    CacheTensor,
    Device,
    cache_tensors,
    is_bfloat16,
    on_device,
)
from nmexport.runtimes.engine import REBUILD, read_engine
from nmexport.runtimes.feeds import float32_from
from nmexport.runtimes.native import (
    device_visible,
    engine_library,
    free_device_memory,
    require_library,
    wait_for_device,
)
from nmexport.runtimes.onnxruntime_opening import (
    EXTERNAL_DATA_FOLDER,
    NUMPY_TYPES,
    ONNX_TYPES,
    open_inference_session,
    read_model,
    session_options,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Side

LOGITS, CHOSEN = "logits", "next_ids"
NO_GRAPH = "-1"
"""In place of the number of a CUDA graph: the run is not recorded."""
_INT64 = 7
"""As ONNX numbers element types."""

Place = tuple[list[int], int]
"""Shape of a tensor on the device, and its address."""


class CudaModel:
    """The graph that `graph.cuda` makes, opened with CUDA graphs enabled."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        positions: int,
        device: Device = "cuda",
        library: Path | None = None,
    ) -> None:
        """Take over an open session.

        Args:
            session: A model as `graph.cuda` rewrites it.
            positions: Tokens of a sequence that its rotary tables cover.
            device: `cpu` computes the same without a GPU, for tests.
            library: The native library; None is the one that was built here.

        Raises:
            ArtifactError: if the graph was made by another version.
            EnvironmentFault: if the device is `cuda` and the library is missing.
        """
        outputs = {value.name: value for value in session.get_outputs()}
        if CHOSEN not in outputs:
            raise ArtifactError(
                "The graph for CUDA was made by another version of nmexport.",
                allowed=f"one with an output {CHOSEN}",
                fix=REBUILD,
            )
        self._library = library or (require_library() if device == "cuda" else None)
        self._session: onnxruntime.InferenceSession | None = session
        self.device: Device = device
        self.positions = positions
        self.cache_tensors: Sequence[CacheTensor] = cache_tensors(session)
        self.logits_type: str = outputs[LOGITS].type
        self.vocabulary_size: int = outputs[LOGITS].shape[2]

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The open session."""
        if self._session is None:
            raise RuntimeError("the session is closed")
        return self._session

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache."""
        return sum(tensor.token_bytes for tensor in self.cache_tensors)

    @property
    def logits_dtype(self) -> np.dtype[Any]:
        """NumPy's type of logits; bfloat16 is its bits."""
        return NUMPY_TYPES[self.logits_type]

    def free_bytes(self) -> int:
        """Free bytes of device memory."""
        if self._library is None or self.device == "cpu":
            return free_memory()
        return free_device_memory(self._library)

    def wait(self) -> None:
        """Wait for all work on the device; other threads keep running."""
        if self._library is not None and self.device == "cuda":
            wait_for_device(self._library)

    def options(self, graph: str, *, waits: bool = True) -> Any:
        """Options of a run.

        Args:
            graph: Number of the CUDA graph that it is recorded as, or `NO_GRAPH`.
            waits: False lets the run return while the device still computes.
        """
        options = onnxruntime.RunOptions()
        if self.device == "cuda":
            options.add_run_config_entry("gpu_graph_id", graph)
            if not waits:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def bind_caches(self, binding: Any, places: Iterable[Place]) -> None:
        """Bind each tensor of a cache as input and as output."""
        for tensor, (shape, address) in zip(self.cache_tensors, places, strict=True):
            # By address: a buffer of bfloat16 is one of 16-bit integers to NumPy and OrtValue.
            place = (self.device, 0, ONNX_TYPES[tensor.type], shape, address)
            binding.bind_input(tensor.past, *place)
            binding.bind_output(tensor.present, *place)

    def bind_bound(self, binding: Any, bound: int) -> None:
        """Bind an upper bound on the tokens of the longest sequence."""
        # On the host: the runtime reads it when it launches, or records.
        total = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(bound, np.int32))
        binding.bind_ortvalue_input("total_sequence_length", total)

    def bind_logits(self, binding: Any, value: Any) -> None:
        """Let a run write its logits into an OrtValue of the device."""
        kind = ONNX_TYPES[self.logits_type]
        binding.bind_output(LOGITS, self.device, 0, kind, value.shape(), value.data_ptr())

    def bind_host_output(self, binding: Any, output: str, rows: tuple[int, int]) -> NDArray[Any]:
        """Let a run write one of its outputs into memory of the host.

        Args:
            binding: The run's.
            output: `LOGITS`, or `CHOSEN`.
            rows: Sequences, and tokens of each that the output is wanted for: `[B, L]`.

        Returns:
            The memory, `[B, L, V]` or `[B, L]`.
        """
        is_chosen = output == CHOSEN
        shape = rows if is_chosen else (*rows, self.vocabulary_size)
        values: NDArray[Any] = np.empty(shape, np.int64 if is_chosen else self.logits_dtype)
        kind = _INT64 if is_chosen else ONNX_TYPES[self.logits_type]
        binding.bind_output(output, "cpu", 0, kind, list(shape), values.ctypes.data)
        return values

    def to_float32(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        """Convert logits on the host to float32."""
        return float32_from(logits, is_bfloat16=is_bfloat16(self.logits_type))

    def read_logits(self, value: Any) -> NDArray[np.float32]:
        """Copy logits to the host, before the next step overwrites the device's."""
        logits: NDArray[Any] = value.numpy()
        return self.to_float32(logits.copy() if self.device == "cpu" else logits)  # that is a view

    def visible(self, *shape: int) -> NDArray[np.int64]:
        """Make zeros in host memory that the device can address too."""
        if self._library is None or self.device == "cpu":
            return np.zeros(shape, np.int64)
        return device_visible(self._library, shape, np.dtype(np.int64))

    def place(self, array: NDArray[np.int64]) -> tuple[Any, ...]:
        """Return the arguments that bind a `visible` array as device memory."""
        return self.device, 0, _INT64, list(array.shape), array.ctypes.data

    def on_device(self, array: NDArray[Any]) -> Any:
        """Copy an array into an OrtValue of the device."""
        return on_device(array, self.device)

    def close(self) -> None:
        """Free the model."""
        self._session = None


def open_engine_graph(path: Path, *, side: Side = "sparse") -> CudaModel:
    """Open one of the graphs for CUDA that `engine.json` names.

    Args:
        path: `engine.json`, or the folder that holds it.
        side: Which model.

    Raises:
        ArtifactError: see `read_engine`, `engine_library`.
        EnvironmentFault: if the native library is missing here, or CUDA does not work.
    """
    engine = read_engine(path)
    cuda = engine.cuda
    model, weights = None if cuda is None else cuda.of(side), engine.exported(side)
    if cuda is None or model is None or weights is None:
        raise ArtifactError(
            f"{path} has no {side} graph for CUDA.",
            fix="run `nmexport engine --force`",
        )
    library = engine_library(engine)
    options = session_options(
        library=library,
        threads=engine.threads,
        config={**engine.session_config, EXTERNAL_DATA_FOLDER: str(weights.parent)},
    )
    session = open_inference_session(read_model(model), options, "cuda", records_graphs=True)
    return CudaModel(session, positions=cuda.positions, library=library)
