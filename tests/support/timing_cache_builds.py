"""Two builds by Polygraphy on a TensorRT that is not there: prints what became of the timing cache.

A program of its own, as Polygraphy takes one of TensorRT's two products for the life of a process.
Usage: python -m tests.support.timing_cache_builds CACHE-FILE
"""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TACTICS = ("gemm", "norm", "softmax")
EVENTS: list[str] = []


class TimingCache:
    """Timings by tactic."""

    def __init__(self, kept: bytes) -> None:
        EVENTS.append("load" if kept else "make")
        self.timings: dict[str, int] = json.loads(kept or b"{}")

    @contextlib.contextmanager
    def serialize(self) -> Iterator[bytes]:
        EVENTS.append("serialise")
        yield json.dumps(self.timings).encode()

    def combine(self, other: TimingCache, *, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch
        self.timings = {**other.timings, **self.timings}
        return True


class Network(list[Any]):
    """Nothing to compute."""

    num_layers = num_inputs = num_outputs = 0

    def get_flag(self, flag: object) -> bool:
        return True


class Config:
    """A builder configuration."""

    DLA_core = -1
    default_device_type = "gpu"
    num_optimization_profiles = 1
    create_timing_cache = staticmethod(TimingCache)

    def set_timing_cache(self, cache: TimingCache, *, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self.cache = cache

    def get_timing_cache(self) -> TimingCache:
        return self.cache

    def add_optimization_profile(self, profile: object) -> None: ...

    def get_flag(self, flag: object) -> bool:
        return False


class Builder:
    """Times what the cache does not know; `meanwhile` is what others do during a build."""

    reused: list[int] = []  # noqa: RUF012 (a program's state)
    meanwhile = staticmethod(lambda: None)

    def __init__(self, logger: object) -> None: ...

    def create_network(self, flags: int) -> Any:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> str:
        return "a profile"

    def build_serialized_network(self, network: object, config: Config) -> bytes:
        EVENTS.append("build")
        timings = config.cache.timings
        self.reused.append(sum(tactic in timings for tactic in TACTICS))
        timings.update(dict.fromkeys(TACTICS, 1))
        self.meanwhile()
        return b"a plan"


def fake_tensorrt() -> ModuleType:
    """As much of the module as a build touches."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = "10.14.1"

    class ILogger:
        ERROR, INFO = 1, 3

    module.ILogger = ILogger
    module.IProgressMonitor = type("IProgressMonitor", (), {})
    module.Builder = Builder
    module.OnnxParser = lambda *_: SimpleNamespace(parse=lambda *_: True)
    module.NetworkDefinitionCreationFlag = enum.IntEnum("Creation", {"STRONGLY_TYPED": 1})
    module.ProfilingVerbosity = enum.IntEnum("Verbosity", {"DETAILED": 2})
    module.BuilderFlag = enum.IntEnum("BuilderFlag", {"REFIT": 1})
    module.DeviceType = SimpleNamespace(DLA="dla")
    return module


def main() -> None:
    """Build twice; while the second build runs, another process saves a timing of its own."""
    sys.modules["tensorrt"] = fake_tensorrt()
    from nmexport.progress import Silent
    from nmexport.runtimes.tensorrt import building
    from nmexport.runtimes.tensorrt import library as tensorrt_library
    from nmexport.runtimes.tensorrt.profiles import Profile
    from polygraphy import util

    tensorrt_library.gpu_is_usable = lambda: True
    tensorrt_library.compute_capability = lambda: "9.0"
    real = util.LockFile

    class Recorded(real):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            EVENTS.append("lock")
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            EVENTS.append("unlock")

    util.LockFile = Recorded
    cache = Path(sys.argv[1])

    def another_saves() -> None:
        cache.write_text(json.dumps({**json.loads(cache.read_text()), "theirs": 2}))

    order = building.Order(
        target="tensorrt",
        model=b"",
        weights_beside=cache,
        profiles=[Profile(name="all", shapes={})],
        timing_cache=cache,
    )
    for meanwhile in (lambda: None, another_saves):
        Builder.meanwhile = staticmethod(meanwhile)
        building.build(order, Silent())
    kept = sorted(json.loads(cache.read_text()))
    sys.stdout.write(json.dumps({"reused": Builder.reused, "kept": kept, "events": EVENTS}))


if __name__ == "__main__":
    main()
