"""TensorRT and a GPU made of ONNX Runtime and host memory: a session's own logic on any machine.

The fake engine's plan is the ONNX graph that the real one would be built from. A run reads its
inputs from the addresses it was given and writes its outputs there, and refuses what TensorRT
refuses: shapes outside the profile, missing addresses, a cache that is not in place.
"""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from nmexport.errors import EnvironmentFault
from nmexport.runtimes.tensorrt.cuda_memory import Buffer

import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_KINDS = {
    1: ("FLOAT", np.float32),
    10: ("HALF", np.float16),
    6: ("INT32", np.int32),
    7: ("INT64", np.int64),
}


class HostDevice:
    """A `Device` in host memory that counts what a session does with it."""

    stream = 7

    def __init__(self, *, capturable: bool = True, capturable_engine: bool = True) -> None:
        self.live: dict[int, Any] = {}
        self.launches = 0
        self.capturing: list[Callable[[], None]] | None = None
        self.capturable = capturable
        self.capturable_engine = capturable_engine
        self.captures = 0

    def allocate(self, size: int) -> Buffer:
        memory = (ctypes.c_char * max(size, 1))()
        address = ctypes.addressof(memory)
        self.live[address] = memory
        return Buffer(address, size, self.live.pop)

    def upload(self, array: np.ndarray, buffer: Buffer) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= buffer.size
        ctypes.memmove(buffer.address, array.ctypes.data, array.nbytes)

    def download(self, buffer: Buffer, array: np.ndarray) -> None:
        assert array.nbytes <= buffer.size
        ctypes.memmove(array.ctypes.data, buffer.address, array.nbytes)

    def copy(self, source: Buffer, target: Buffer, size: int) -> None:
        assert size <= min(source.size, target.size)
        ctypes.memmove(target.address, source.address, size)

    def wait(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Any:
        self.captures += 1
        if not self.capturable:
            raise EnvironmentFault("the stream cannot be captured")
        self.capturing = []
        try:
            work()
        finally:
            recorded, self.capturing = self.capturing, None

        def launch() -> None:
            self.launches += 1
            for item in recorded:
                item()

        return SimpleNamespace(launch=launch)


class RuntimeCache:
    """What TensorRT-RTX compiled; refuses what another machine wrote."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return ("ours\n" + "\n".join(sorted(self.kernels))).encode()

    def deserialize(self, kept: bytes) -> bool:
        owner, *kernels = kept.decode().split("\n")
        self.kernels |= set(kernels) if owner == "ours" else set()
        return owner == "ours"


class RuntimeConfig:
    """How an execution context of TensorRT-RTX is made."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = "disabled"
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Context:
    """An execution context of a fake engine."""

    def __init__(self, engine: FakeEngine, config: RuntimeConfig | None = None) -> None:
        self.engine = engine
        self.config = config
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.profiles[self.profile][name]
        inside = all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))
        if not inside:
            told = f"{name} {shape} outside of {least} to {most}"
            self.engine.logger.add(told, error=told)
        self.shapes[name] = tuple(shape)
        return inside

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.kinds

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostDevice.stream
        device = self.engine.device
        if device.capturing is None:
            return self.run()
        if not device.capturable_engine:
            self.engine.logger.add("ERROR: not capturable", error="not capturable")
            return False
        device.capturing.append(self.run)
        return True

    def run(self) -> bool:
        engine = self.engine
        feeds = {name: engine.read(name, self) for name in engine.inputs}
        for name, value in zip(engine.outputs, engine.session.run(None, feeds), strict=True):
            if engine.in_place and name.startswith("present."):
                past = name.replace("present.", "past_key_values.", 1)
                assert self.addresses[name] == self.addresses[past], "the cache is not in place"
            array = np.ascontiguousarray(value)
            ctypes.memmove(self.addresses[name], array.ctypes.data, array.nbytes)
        return True


class FakeEngine:
    """What deserialising gives."""

    def __init__(self, plan: bytes, device: HostDevice, logger: Any) -> None:
        header, _, model = plan.partition(b"\n")
        described = json.loads(header)
        self.profiles = described["profiles"]
        self.in_place = described["in_place"]
        self.device, self.logger = device, logger
        self.contexts: list[Context] = []
        graph = onnx.load_from_string(model).graph
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", described["folder"]
        )
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        self.kinds = {
            value.name: _KINDS[value.type.tensor_type.elem_type]
            for value in (*graph.input, *graph.output)
        }
        self.shapes = {
            value.name: tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.output)
        }

    def read(self, name: str, context: Context) -> np.ndarray:
        shape = context.shapes[name]
        dtype = np.dtype(self.kinds[name][1])
        size = int(np.prod(shape)) * dtype.itemsize
        raw = ctypes.string_at(context.addresses[name], size)
        return np.frombuffer(raw, dtype).reshape(shape)

    @property
    def num_io_tensors(self) -> int:
        return len(self.kinds)

    def get_tensor_name(self, index: int) -> str:
        return list(self.kinds)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{self.kinds[name][0]}"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        made = Context(self, config)
        self.contexts.append(made)
        if config is not None and config.cache is not None:
            config.cache.kernels.add(f"profile {len(self.contexts)}")
        return made

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()


def fake_module(device: HostDevice) -> Any:
    """A stand-in for the TensorRT module, as far as a session uses it."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            if plan.startswith(b"broken"):
                self.logger.add("ERROR: the plan is broken", error="the plan is broken")
                return None
            return FakeEngine(plan, device, self.logger)

    return SimpleNamespace(
        Runtime=Runtime,
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        __version__="99",
    )


def fake_plan(
    model: bytes, folder: Path, profiles: list[dict[str, Any]], *, in_place: bool
) -> bytes:
    """A plan of a fake engine."""
    described = {"profiles": profiles, "folder": str(folder), "in_place": in_place}
    return json.dumps(described).encode() + b"\n" + model
