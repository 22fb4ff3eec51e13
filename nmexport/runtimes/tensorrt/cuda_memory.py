"""CUDA as a session needs it: memory, copies, one stream, graphs; through cuda-python."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from nmexport.errors import EnvironmentFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


class Device(Protocol):
    """One device with one stream; every call is enqueued on it but where it says that it waits."""

    @property
    def stream(self) -> int:
        """The stream's handle."""
        ...

    def allocate(self, size: int) -> Buffer:
        """Allocate bytes, all zero; freed when dropped.

        Raises:
            EnvironmentFault: if the device has not so much left.
        """
        ...

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Copy a contiguous array to the front of a buffer."""
        ...

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy the front of a buffer to a contiguous array, and wait for it."""
        ...

    def copy(self, source: Buffer, target: Buffer, size: int) -> None:
        """Copy bytes on the device."""
        ...

    def wait(self) -> None:
        """Wait for everything that is enqueued."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` enqueues, without running it."""
        ...


class Graph(Protocol):
    """Recorded work."""

    def launch(self) -> None:
        """Enqueue it again."""
        ...


class Buffer:
    """Device memory that is freed when the last reference is gone."""

    def __init__(self, address: int, size: int, free: Callable[[int], None]) -> None:
        """Own the memory at an address."""
        self.address = address
        self.size = size
        self._finalizer = weakref.finalize(self, free, address)

    def free(self) -> None:
        """Free it now."""
        self._finalizer()


class CudaDevice:
    """A GPU; implements `Device`."""

    def __init__(self, ordinal: int = 0) -> None:
        """Use a GPU of this machine.

        Raises:
            EnvironmentFault: if cuda-python is missing, or the GPU cannot be used.
        """
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise EnvironmentFault(
                f"A TensorRT session needs the Python package cuda-bindings: {error}",
                fix="pip install cuda-bindings",
            ) from error
        self._runtime = runtime
        self._check(runtime.cudaSetDevice(ordinal))
        (stream,) = self._check(
            runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking), wanted=1
        )
        self._stream = stream

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def allocate(self, size: int) -> Buffer:
        """See `Device`."""
        runtime = self._runtime
        (address,) = self._check(runtime.cudaMalloc(max(size, 1)), wanted=1)

        def free(at: int) -> None:
            runtime.cudaFree(at)

        buffer = Buffer(int(address), size, free)
        self._check(runtime.cudaMemsetAsync(buffer.address, 0, max(size, 1), self._stream))
        return buffer

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """See `Device`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(buffer.address, array.ctypes.data, array.nbytes, kind)

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """See `Device`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, buffer.address, array.nbytes, kind)
        self.wait()

    def copy(self, source: Buffer, target: Buffer, size: int) -> None:
        """See `Device`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target.address, source.address, size, kind)

    def wait(self) -> None:
        """See `Device`."""
        self._check(self._runtime.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        """See `Device`."""
        runtime = self._runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(runtime.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        (graph,) = self._check(runtime.cudaStreamEndCapture(self._stream), wanted=1)
        try:
            (executable,) = self._check(runtime.cudaGraphInstantiate(graph, 0), wanted=1)
        finally:
            runtime.cudaGraphDestroy(graph)
        return CudaGraph(self, executable)

    def _abandon_capture(self) -> None:
        """End a capture whose work failed, so that the stream stays usable."""
        status, graph = self._runtime.cudaStreamEndCapture(self._stream)
        if int(status) == 0:
            self._runtime.cudaGraphDestroy(graph)
        else:
            self._runtime.cudaGetLastError()  # or who asks next takes it for a fault of his own

    def launch(self, executable: Any) -> None:
        """Enqueue an instantiated graph."""
        self._check(self._runtime.cudaGraphLaunch(executable, self._stream))

    def destroy_graph(self, executable: Any) -> None:
        """Free an instantiated graph."""
        self._runtime.cudaGraphExecDestroy(executable)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._check(self._runtime.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def _check(self, answer: tuple[Any, ...], *, wanted: int = 0) -> tuple[Any, ...]:
        """Check a call's status, and return its other results.

        Raises:
            EnvironmentFault: if it failed.
        """
        status, *values = answer
        if int(status) != 0:
            self._runtime.cudaGetLastError()  # or who asks next takes it for a fault of his own
            _, text = self._runtime.cudaGetErrorString(status)
            message = text.decode() if isinstance(text, bytes) else str(text)
            raise EnvironmentFault(
                f"The GPU failed: {message}.",
                fix="`nvidia-smi` shows who uses it and how much memory is left; a smaller "
                "engine.max_batch or engine.max_context takes less",
            )
        return tuple(values[:wanted])


class CudaGraph:
    """An instantiated CUDA graph; implements `Graph`."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        """Own an instantiated graph."""
        self._device = device
        self._executable = executable
        self._finalizer = weakref.finalize(self, device.destroy_graph, executable)

    def launch(self) -> None:
        """Enqueue it."""
        self._device.launch(self._executable)
