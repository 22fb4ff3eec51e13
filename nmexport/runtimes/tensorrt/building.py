"""Builds one plan from one ONNX graph, with progress, a log and a way to stop.

Polygraphy makes the builder configuration, runs the builder, and locks and merges the timing
cache. It parses files only, and the graph here is in no file, so the parser is called directly.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError, EnvironmentFault, NmexportError
from nmexport.runtimes.engine import EngineTensor
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt.build_progress import PERCENT, Meter
from nmexport.runtimes.tensorrt.requirements import check_gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from nmexport.progress import Progress
    from nmexport.runtimes.engine import TensorRTTarget
    from nmexport.runtimes.tensorrt.library import Messages
    from nmexport.runtimes.tensorrt.profiles import Profile

_POLL_SECONDS = 0.2
NO_TIMING_CACHE = "TensorRT-RTX times nothing while it builds: it compiles on the user's GPU"


@dataclass(frozen=True, kw_only=True)
class Order:
    """An engine to build."""

    target: TensorRTTarget
    model: bytes
    """A serialised ONNX graph."""
    weights_beside: Path
    """The file that the graph came from; its external data lies next to it."""
    profiles: Sequence[Profile]
    compute_capabilities: tuple[str, ...] = ()
    """None is the GPU of this machine."""
    plugin: Path | None = None
    """The plugin library; None where the graph needs none."""
    embed_plugin: bool = False
    timing_cache: Path | None = None
    log: Path | None = None
    """Every line of TensorRT and the plugin is added to this file, as it comes."""
    label: str = "engine"


@dataclass(frozen=True, kw_only=True)
class NetworkLayer:
    """A layer of the parsed network."""

    name: str
    kind: str
    """TensorRT's name of its type, such as `PLUGIN_V3`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Result of a build."""

    data: bytes
    layers: tuple[NetworkLayer, ...]
    tensors: tuple[EngineTensor, ...]
    """Inputs and outputs of the parsed network."""
    parse_seconds: float
    build_seconds: float


def build(order: Order, progress: Progress) -> Plan:
    """Build one plan.

    Raises:
        RecipeError: if the target does not build for such GPUs.
        EnvironmentFault: if TensorRT, its Python package's partner Polygraphy, or the plugin
            library is missing here, or no GPU is here and none was named.
        ArtifactError: if the parser or the builder refuses the graph; names the node where our
            plugin did.
    """
    trt = tensorrt_library.load(order.target)
    check_gpus(order.target, order.compute_capabilities)
    logger = tensorrt_library.logger_of(order.target)
    mark = logger.mark()
    try:
        with tensorrt_library.quiet(), _open_kept(logger, order):
            return _build(trt, logger, order, progress)
    except NmexportError:
        raise
    except Exception as error:  # the bindings raise what they please
        reasons = logger.errors_since(mark) or [str(error)]
        raise _refusal("cannot build this", reasons, order) from error


def parser_takes(target: TensorRTTarget, op: str) -> bool:
    """Tell whether the parser knows an ONNX operator; it may still refuse a node of it."""
    trt = tensorrt_library.load(target)
    logger = tensorrt_library.logger_of(target)
    with tensorrt_library.quiet():
        network = _empty_network(trt, trt.Builder(logger))
        return bool(trt.OnnxParser(network, logger).supports_operator(op))


@contextlib.contextmanager
def _open_kept(logger: Messages, order: Order) -> Iterator[None]:
    """Write the log of a build while it runs, so that it survives a crash."""
    if order.log is None:
        yield
        return
    with (
        order.log.open("a", encoding="utf-8", buffering=1) as stream,
        logger.heard_by(lambda line: stream.write(f"[{order.label}] {line}\n")),
    ):
        yield


def _build(trt: Any, logger: Any, order: Order, progress: Progress) -> Plan:
    if order.plugin is not None:
        tensorrt_library.prepare_parser(order.target)
    builder = trt.Builder(logger)
    if order.plugin is not None:
        tensorrt_library.register_plugin(order.target, order.plugin)
    network = _empty_network(trt, builder)
    began = time.monotonic()
    _parse(trt, logger, network, order)
    parsed = time.monotonic()
    mark = logger.mark()
    monitor = _monitor_of(trt)
    make = _builder_run(trt, (builder, network), order, monitor)
    try:
        data = _follow(make, monitor, order.label, progress)
    except _polygraphy_exception() as error:
        reasons = logger.errors_since(mark) or [str(error)]
        raise _refusal("does not build the graph", reasons, order) from error
    return Plan(
        data=data,
        layers=_layers(network),
        tensors=_tensors(network),
        parse_seconds=round(parsed - began, 3),
        build_seconds=round(time.monotonic() - parsed, 3),
    )


def _empty_network(trt: Any, builder: Any) -> Any:
    # Strong typing is the only typing from version 11 on, where the flag says nothing new.
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _parse(trt: Any, logger: Any, network: Any, order: Order) -> None:
    mark = logger.mark()
    parser = trt.OnnxParser(network, logger)
    if order.plugin is not None:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if parser.parse(order.model, str(order.weights_beside)):
        return
    faults = [parser.get_error(index) for index in range(parser.num_errors)]
    reasons = [f"node {fault.node_name()}: {fault.desc()}" for fault in faults]
    logged = logger.errors_since(mark)
    ours = [line for line in logged if line.startswith("nmexport ")]
    raise _refusal("does not take the graph", [*ours, *reasons] or logged, order)


def _refusal(what: str, errors: Sequence[str], order: Order) -> ArtifactError:
    reasons = list(tensorrt_library.ours_first(errors))
    shown = "\n".join(f"  {line}" for line in reasons[:5]) or "  it gives no reason"
    whole = "" if order.log is None else f"the whole log is in {order.log}; "
    return ArtifactError(
        f"TensorRT {what}:\n{shown}", fix=f"{whole}`nmexport doctor` shows versions"
    )


def _layers(network: Any) -> tuple[NetworkLayer, ...]:
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(
        NetworkLayer(name=layer.name, kind=str(layer.type).rpartition(".")[2]) for layer in layers
    )


def _tensors(network: Any) -> tuple[EngineTensor, ...]:
    inputs = [(network.get_input(index), True) for index in range(network.num_inputs)]
    outputs = [(network.get_output(index), False) for index in range(network.num_outputs)]
    return tuple(
        EngineTensor(
            name=tensor.name,
            element=str(tensor.dtype).rpartition(".")[2],
            shape=tuple(tensor.shape),
            is_input=is_input,
        )
        for tensor, is_input in (*inputs, *outputs)
    )


# -- Polygraphy -----------------------------------------------------------------------------------


def _polygraphy(target: TensorRTTarget) -> Any:
    """Import Polygraphy's TensorRT backend, set to the target.

    Raises:
        EnvironmentFault: if it is missing, or was loaded for the other product before.
    """
    is_rtx = target == "tensorrt-rtx"
    try:
        from polygraphy import config

        if "polygraphy.backend.trt" in sys.modules and is_rtx != config.USE_TENSORRT_RTX:
            raise EnvironmentFault(
                "This process has built for the other TensorRT product already.",
                fix="build for each target in a process of its own",
            )
        config.USE_TENSORRT_RTX = is_rtx
        from polygraphy.backend import trt as backend
    except ImportError as error:
        raise EnvironmentFault(
            f"Target {target} needs the Python package polygraphy: {error}",
            fix="pip install polygraphy",
        ) from error
    return backend


def _polygraphy_exception() -> type[Exception]:
    from polygraphy.exception import PolygraphyException

    kind: type[Exception] = PolygraphyException
    return kind


def _builder_run(
    trt: Any, network: tuple[Any, Any], order: Order, monitor: Any
) -> Callable[[], bytes]:
    """Make a function that runs the builder on `(builder, network)`."""
    backend = _polygraphy(order.target)
    with _mute():
        make = backend.EngineBytesFromNetwork(
            network,
            config=_configuration(trt, backend, order, monitor),
            save_timing_cache=None if order.timing_cache is None else str(order.timing_cache),
        )

    def build() -> bytes:
        with _mute():
            return bytes(make())

    return build


def _mute() -> contextlib.AbstractContextManager[Any]:
    """Keep Polygraphy's messages off stdout: what matters of them comes through our own logger."""
    from polygraphy.logger import G_LOGGER

    muted: contextlib.AbstractContextManager[Any] = G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1)
    return muted


def _configuration(trt: Any, backend: Any, order: Order, monitor: Any) -> Any:
    """Make a function that makes the builder configuration."""
    common = {
        "profiles": [_polygraphy_profile(backend, profile) for profile in order.profiles],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": monitor,
        "load_timing_cache": None if order.timing_cache is None else str(order.timing_cache),
    }
    if order.target == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        pairs = [tuple(map(int, text.split("."))) for text in order.compute_capabilities]
        config = CreateConfigRTX(
            compute_capabilities=pairs or None, use_gpu=None if pairs else True, **common
        )
    else:
        config = backend.CreateConfig(**common)
    if not (order.embed_plugin and order.plugin):
        return config

    def with_plugin(builder: Any, network: Any) -> Any:
        made = config(builder, network)
        made.plugins_to_serialize = [str(order.plugin)]
        return made

    return with_plugin


def _polygraphy_profile(backend: Any, profile: Profile) -> Any:
    made = backend.Profile()
    for name, (least, best, largest) in profile.shapes.items():
        made.add(name, min=least, opt=best, max=largest)
    return made


# -- progress -------------------------------------------------------------------------------------


def _monitor_of(trt: Any) -> Any:
    """Make a TensorRT progress monitor that queues every hundredth part of the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.ticks: queue.SimpleQueue[int] = queue.SimpleQueue()
            self.meter = Meter(self.ticks.put)
            self.stopped = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.meter.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            del step
            self.meter.step(name)
            return not self.stopped

        def phase_finish(self, name: str) -> None:
            self.meter.finish(name)

    return Monitor()


def _follow(make: Callable[[], bytes], monitor: Any, label: str, progress: Progress) -> bytes:
    """Run the builder in a thread of its own and show how far it is; an interrupt stops it."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt-build") as pool:
        future: Future[bytes] = pool.submit(make)
        try:
            for _ in progress.track(_ticks(future, monitor), label=label, total=PERCENT):
                pass
        except BaseException:
            monitor.stopped = True  # the builder ends at its next step, and the pool waits for it
            raise
        return future.result()


def _ticks(future: Future[bytes], monitor: Any) -> Iterator[int]:
    while not (future.done() and monitor.ticks.empty()):
        try:
            yield monitor.ticks.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
