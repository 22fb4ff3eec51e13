"""Execution contexts of a TensorRT engine: one for each optimization profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError
from nmexport.runtimes.tensorrt import library as tensorrt_library

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.runtimes.engine import TensorRTEngine
    from nmexport.runtimes.tensorrt.cuda_memory import Buffer, Device
    from nmexport.runtimes.tensorrt.kernel_cache import KernelCache
    from nmexport.runtimes.tensorrt.library import Messages


class Contexts:
    """Runs an engine under one of its profiles, on the device's stream."""

    def __init__(
        self,
        trt: Any,
        engine: Any,
        described: TensorRTEngine,
        *,
        device: Device,
        logger: Messages,
        kernels: KernelCache | None,
    ) -> None:
        """Make a context for every profile.

        Args:
            trt: The TensorRT module.
            engine: The deserialised engine.
            described: Its description.
            device: Where it runs.
            logger: Of that module.
            kernels: Where TensorRT-RTX keeps what it compiles.

        Raises:
            ArtifactError: if TensorRT refuses one.
        """
        self._trt = trt
        self._engine = engine
        self._described = described
        self._stream = device.stream
        self._logger = logger
        self._kernels = kernels
        self.records_itself = False
        """TensorRT-RTX replaces kernels while it runs, and records its graphs when it is done."""
        self._configs: list[Any] = []  # must live as long as their contexts
        self._contexts = {
            profile: self._open(index, profile) for index, profile in enumerate(described.profiles)
        }

    def enqueue(
        self,
        profile: str,
        shapes: Mapping[str, tuple[int, ...]],
        bindings: Mapping[str, Buffer],
    ) -> None:
        """Bind input shapes and the buffers of all inputs and outputs, and run.

        Raises:
            ArtifactError: if TensorRT refuses any of it.
        """
        context = self._contexts[profile]
        mark = self._logger.mark()
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"input {name} of shape {shape}", mark)
        for name, buffer in bindings.items():
            if not context.set_tensor_address(name, buffer.address):
                raise self._failure(f"the buffer of {name}", mark)
        self.execute(profile)

    def execute(self, profile: str) -> None:
        """Run again with what is bound.

        Raises:
            ArtifactError: if TensorRT refuses to.
        """
        mark = self._logger.mark()
        if not self._contexts[profile].execute_async_v3(self._stream):
            raise self._failure("a run", mark)

    def clear(self) -> None:
        """Free the contexts."""
        self._contexts.clear()
        self._configs.clear()
        self._engine = None

    def _open(self, index: int, profile: str) -> Any:
        mark = self._logger.mark()
        context = self._new_context(profile)
        if context is None or not context.set_optimization_profile_async(index, self._stream):
            raise self._failure("an execution context", mark)
        return context

    def _new_context(self, profile: str) -> Any:
        """Make a context; TensorRT-RTX's compiles its kernels, and keeps them in a cache."""
        if self._described.target != "tensorrt-rtx":
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        self._configs.append(config)
        if self._kernels is not None:
            self._kernels.attach(config)
        if profile == "decode" and self._described.in_place_cache:
            # Decode steps have one shape for good. Kernels are compiled for it at the first step.
            # The runtime records the step itself: it alone knows when no kernel will be replaced.
            specialised = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = specialised
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.records_itself = True
        return self._engine.create_execution_context(config)

    def _failure(self, what: str, mark: int) -> ArtifactError:
        return ArtifactError(
            f"TensorRT refuses {what}: {reasons_since(self._logger, mark)}",
            fix="run `nmexport engine --force`; `nmexport doctor` shows what this machine lacks",
        )


def reasons_since(logger: Messages, mark: int) -> str:
    """Return the reasons that TensorRT logged after a mark."""
    reasons = list(tensorrt_library.ours_first(logger.errors_since(mark)))
    return "; ".join(reasons[-3:]) or "it gives no reason"
