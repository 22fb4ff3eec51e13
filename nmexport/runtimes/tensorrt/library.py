"""TensorRT or TensorRT-RTX as this machine has it, with our plugin library loaded into it.

Both offer one Python interface under two names; nothing else here tells them apart but the name and
a missing link: TensorRT-RTX's parser looks for `libtensorrt_rtx.so`, and its package carries that
library under its versioned name only. A process that adds a plugin layer without the link is ended
by the parser, so a library of that name, which leads to the loaded one, is built with the plugin.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import warnings
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

from packaging.version import Version

from nmexport import __version__
from nmexport.errors import EnvironmentFault
from nmexport.resources import NATIVE_FOLDER
from nmexport.runtimes.rebuilding import plugin_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from nmexport.runtimes.engine import TensorRTTarget

TARGETS: tuple[TensorRTTarget, ...] = ("tensorrt", "tensorrt-rtx")

PLUGIN = "libnmexport_tensorrt.so"
NAME_LIBRARY = "libnmexport_rtx_name.so"
PLUGIN_OPS = ("NMPrune", "NMLinear")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""GPUs that TensorRT-RTX runs on."""
_OLDEST = {"tensorrt": "10.13", "tensorrt-rtx": "1.7"}
_FOLDER = NATIVE_FOLDER
_KEPT_ERRORS = 64
FIX_PLUGIN = plugin_command()


def load(target: TensorRTTarget) -> Any:
    """Import the Python module of a target.

    Raises:
        EnvironmentFault: if it is missing, cannot be loaded, or is too old.
    """
    try:
        module = importlib.import_module(_MODULES[target])
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentFault(
            f"Target {target} needs the Python package {target}: {error}",
            fix=f"pip install {target}",
        ) from error
    oldest = _OLDEST[target]
    if Version(module.__version__) < Version(oldest):
        raise EnvironmentFault(
            f"The installed {target} is version {module.__version__}.",
            allowed=f"{oldest} or later",
            fix=f"pip install --upgrade {target}",
        )
    return module


def find_plugin() -> Path | None:
    """Find the plugin library; None where it was not built."""
    path = _FOLDER / PLUGIN
    return path if path.is_file() else None


def require_plugin() -> Path:
    """Find the plugin library.

    Raises:
        EnvironmentFault: if it was not built.
    """
    path = find_plugin()
    if path is None:
        raise EnvironmentFault(
            "The TensorRT plugin library is missing.",
            allowed=str(_FOLDER / PLUGIN),
            fix=FIX_PLUGIN,
        )
    return path


class PluginDescription(TypedDict):
    """The plugin library's description of itself."""

    version: str
    """The version of the package that it was built from."""
    tensorrt_headers: str
    cuda: int
    """The runtime, as 13000 for 13.0."""
    architectures: str
    """Compute capabilities as CMake names them, joined by commas."""
    plugin_version: str
    """Of the ops in TensorRT's registry."""


def describe_plugin(path: Path) -> PluginDescription:
    """Ask the library for its version, headers, CUDA and architectures.

    Raises:
        EnvironmentFault: if it cannot be loaded or is not ours.
    """
    try:
        library = ctypes.CDLL(str(path))
        describe = library.nmexport_describe_plugin
    except (OSError, AttributeError) as error:
        raise EnvironmentFault(
            f"{path} cannot be loaded: {error}",
            allowed="the plugin library that this package built",
            fix=FIX_PLUGIN,
        ) from error
    describe.restype = ctypes.c_char_p
    document: PluginDescription = json.loads(describe())
    return document


def check_plugin(path: Path) -> None:
    """Refuse a library of another version.

    Raises:
        EnvironmentFault: if it is one, or cannot be loaded.
    """
    version = describe_plugin(path)["version"]
    if version != __version__:
        raise EnvironmentFault(
            f"The plugin library {path} is version {version}.",
            allowed=__version__,
            fix=FIX_PLUGIN,
        )


def register_plugin(target: TensorRTTarget, path: Path) -> None:
    """Register the plugin library's ops with TensorRT; its messages go to our logger.

    Raises:
        EnvironmentFault: if the library cannot be loaded, or is of another version than this
            package.
    """
    check_plugin(path)
    _log_through(target, path)
    registry = load(target).get_plugin_registry()
    if not _has_ops(registry):
        # TensorRT logs what it thinks of the library; the handle is null where it failed.
        registry.load_library(str(path))
    if not _has_ops(registry):
        raise EnvironmentFault(
            f"TensorRT finds no {' or '.join(PLUGIN_OPS)} in {path}.",
            allowed="the plugin library that this package built",
            fix=FIX_PLUGIN,
        )


@cache
def _log_through(target: TensorRTTarget, path: Path) -> Any:
    """Send the library's messages to our logger; what is returned must stay alive."""
    logger = logger_of(target)
    severity = load(target).ILogger.Severity

    def receive(level: int, message: bytes) -> None:
        logger.log(severity(level), message.decode(errors="replace"))

    sink = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_char_p)(receive)
    log_to = ctypes.CDLL(str(path)).nmexport_log_to
    log_to(sink)
    atexit.register(log_to, None)  # no message may come when Python is gone
    return sink


def _has_ops(registry: Any) -> bool:
    # Asked by name, the registry would log an error for each that it lacks.
    known = {creator.name for creator in registry.all_creators}
    return known.issuperset(PLUGIN_OPS)


def prepare_parser(target: TensorRTTarget) -> None:
    """Do what the parser of a target needs before it meets a plugin.

    Raises:
        EnvironmentFault: if the library that stands for the missing link is not there.
    """
    if target != "tensorrt-rtx" or _is_loaded("libtensorrt_rtx.so"):
        return
    try:
        ctypes.CDLL(str(_FOLDER / NAME_LIBRARY))
    except OSError as error:
        raise EnvironmentFault(
            f"TensorRT-RTX's parser needs {NAME_LIBRARY} to find its own library: {error}",
            allowed=str(_FOLDER / NAME_LIBRARY),
            fix=FIX_PLUGIN,
        ) from error


def _is_loaded(name: str) -> bool:
    """Tell whether a library of exactly that name is loaded in this process."""
    no_load = 4  # RTLD_NOLOAD
    try:
        ctypes.CDLL(name, mode=ctypes.DEFAULT_MODE | no_load)
    except OSError:
        return False
    return True


@cache
def gpu_is_usable() -> bool:
    """Tell whether a CUDA driver with a GPU is here."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


class Messages:
    """Messages of TensorRT and the plugin: last errors, and every line while somebody listens."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self._count = 0
        self._listeners: list[Callable[[str], object]] = []

    def add(self, line: str, *, error: str | None = None) -> None:
        """Take a line as the log shows it; `error` is its bare text where it is one."""
        if error is not None:
            self._count += 1
            self._errors.append(error)
        for listener in tuple(self._listeners):
            listener(line)

    def mark(self) -> int:
        """Mark a point in time for `errors_since`."""
        return self._count

    def errors_since(self, mark: int) -> list[str]:
        """Return the errors after a mark, oldest first; only the last if there are many."""
        fresh = min(self._count - mark, len(self._errors))
        return list(self._errors)[len(self._errors) - fresh :]

    @contextlib.contextmanager
    def heard_by(self, listener: Callable[[str], object]) -> Iterator[None]:
        """Pass every line to a listener."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)


@cache
def logger_of(target: TensorRTTarget) -> Any:
    """The one logger of a target's module, which is a `Messages` too; from INFO on.

    One for the life of the process: TensorRT's plugin registry keeps the first it was given.

    Raises:
        EnvironmentFault: see `load`.
    """
    trt = load(target)

    class Logger(Messages, trt.ILogger):  # type: ignore[misc, name-defined]  # known at run time
        def __init__(self) -> None:
            Messages.__init__(self)
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.INFO:
                line = f"{str(severity).rpartition('.')[2]}: {message}"
                self.add(line, error=message if severity <= trt.ILogger.ERROR else None)

    return Logger()


def ours_first(errors: Sequence[str]) -> Iterator[str]:
    """Sort our plugin's errors, which name node, field and value, before TensorRT's own."""
    ours = [line for line in errors if line.startswith("nmexport ")]
    yield from ours or errors


def quiet() -> warnings.catch_warnings[Any]:
    """Silence TensorRT-RTX's deprecation notes on calls that both products share."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def compute_capability(device: int = 0) -> str:
    """Return the compute capability of a GPU of this machine, such as `8.9`.

    Raises:
        EnvironmentFault: if the driver does not tell.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    numbers = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR
        value = ctypes.c_int(0)
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            raise EnvironmentFault(f"The driver does not tell what GPU {device} is.")
        numbers.append(value.value)
    return f"{numbers[0]}.{numbers[1]}"


def preload_cublaslt() -> None:
    """Load cuBLASLt from wherever it is installed, so that the plugin finds it by name.

    Without one the plugin says so when a prompt needs it.
    """
    with contextlib.suppress(Exception):  # the finder raises its own classes
        from cuda.pathfinder import load_nvidia_dynamic_lib

        load_nvidia_dynamic_lib("cublasLt")
