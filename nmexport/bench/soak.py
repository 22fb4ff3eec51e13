"""Memory of a server under a long load: does it grow, and is all of it given back?

Every process of the server counts, by its share of the pages it shares with others (PSS). Clients
come with prompts and answers of mixed lengths, and some are cancelled mid-stream. What the load did
is read from the server's own metrics.
"""

from __future__ import annotations

import itertools
import re
import statistics
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict

from nmexport.bench.http_load import Ask, drive
from nmexport.serving import metrics as names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nmexport.bench.perf_analyzer import PerfAnalyzer
    from nmexport.progress import Progress
    from nmexport.serving.launch import Server

_SAMPLE_SECONDS = 1.0
_COMPARED_SHARE = 0.1
"""Share of the load's time at each end whose samples are compared."""
_LENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Lengths of prompts and answers, as shares of the longest."""
_LEAVE_AFTER = 2
_IDLE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Requests to the server, and for how long."""

    seconds: float = 300.0
    """Duration of the measured load."""
    warmup_seconds: float = 60.0
    """Duration of the same load before, until buffers reach their size."""
    clients: int = 4
    prompt_words: int = 48
    """Length of the longest prompt."""
    output_tokens: int = 32
    """Length of the longest answer."""
    cancel_every: int = 5
    """Cancel every Nth request mid-stream."""

    def asks(self, *, only_leaving: bool = False) -> Iterator[Ask]:
        """Requests without an end."""
        for index, share in zip(itertools.count(), itertools.cycle(_LENGTHS)):
            leaves = only_leaving or index % self.cancel_every == self.cancel_every - 1
            yield Ask(
                fields={
                    "text_input": text_of(max(1, int(share * self.prompt_words))),
                    "max_tokens": max(_LEAVE_AFTER + 1, int(share * self.output_tokens)),
                },
                leave_after=_LEAVE_AFTER if leaves else None,
            )


def text_of(words: int) -> str:
    """A prompt."""
    return "Once" + " upon a time there was a" * (words // 6) + " and" * (words % 6)


class Growth(TypedDict):
    """A server's memory under the load."""

    before_bytes: int
    after_bytes: int
    peak_bytes: int
    growth: float
    """From the beginning to the end, as a share."""
    samples: list[tuple[float, int]]
    """Seconds and bytes."""


class WorkDone(TypedDict):
    """The load as the server counts it."""

    seconds: float
    requests: dict[str, int]
    """By how they ended."""
    tokens_per_s: float
    mean_ttft_ms: float | None
    mean_itl_ms: float | None


class Soaked(WorkDone):
    """The effect of a load on a server."""

    load: dict[str, object]
    by: str
    """The program that made the load."""
    memory: Growth
    left_over: dict[str, int]
    """Requests and cache bytes that it still held when the load was over."""


def soak(
    server: Server,
    model: str,
    load: Soak,
    *,
    analyzer: PerfAnalyzer | None = None,
    progress: Progress,
) -> Soaked:
    """Put a load on a ready server and watch its memory.

    Args:
        server: A server that is ready.
        model: Its text model.
        load: What to ask.
        analyzer: Makes the load over gRPC, in place of the clients here; one of them still comes,
            and always leaves.
        progress: Where to count.

    Raises:
        EnvironmentFault: if the server or the load generator goes away.
        RequestError: if the server refuses a request.
    """
    with _Clients(server, model, load, analyzer) as clients:
        _watch(server, load.warmup_seconds, clients, "soak: warm-up", progress)
        before = read_metrics(server.addresses.metrics, model)
        began = time.monotonic()
        samples = _watch(server, load.seconds, clients, "soak", progress)
        seconds = time.monotonic() - began
        after = read_metrics(server.addresses.metrics, model)
    return {
        "load": asdict(load),
        "by": "perf_analyzer" if analyzer else "nmexport",
        "memory": _compare_ends(samples),
        **_work_done(before, after, seconds),
        "left_over": _wait_until_idle(server, model),
    }


class _Clients:
    """The load, running until it is told to stop."""

    def __init__(
        self, server: Server, model: str, load: Soak, analyzer: PerfAnalyzer | None
    ) -> None:
        self._stopping = threading.Event()
        self._fault: BaseException | None = None
        self._analyzer = analyzer
        self._thread = threading.Thread(target=self._drive, name="soak-clients", daemon=True)
        self._server, self._model, self._load = server, model, load

    def _drive(self) -> None:
        asks = self._load.asks(only_leaving=self._analyzer is not None)
        until_stopped = itertools.takewhile(lambda _: not self._stopping.is_set(), asks)
        clients = 1 if self._analyzer else self._load.clients
        try:
            drive(self._server.addresses.http, self._model, until_stopped, clients=clients)
        except BaseException as error:  # noqa: BLE001  raised where the load is watched
            self._fault = error

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._fault is not None:
            raise self._fault
        if self._analyzer is not None:
            self._analyzer.check()

    def __enter__(self) -> Self:
        if self._analyzer is not None:
            self._analyzer.start(self._server.addresses.grpc, self._model, self._load)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._analyzer is not None:
            self._analyzer.stop()
        self._thread.join()


def _watch(
    server: Server, seconds: float, clients: _Clients, label: str, progress: Progress
) -> list[tuple[float, int]]:
    """Seconds and bytes, a sample a second."""
    samples = []
    began = time.monotonic()
    count = max(1, round(seconds / _SAMPLE_SECONDS))
    for index in progress.track(range(count), label=label, total=count):
        time.sleep(max(0.0, began + (index + 1) * _SAMPLE_SECONDS - time.monotonic()))
        clients.check()
        server.check()
        samples.append((time.monotonic() - began, memory_of(server.process.pid)))
    return samples


def memory_of(process: int) -> int:
    """Bytes of a process and all below it, each page that several share counted once."""
    import psutil

    root = psutil.Process(process)
    return sum(_share_of(process.pid) for process in (root, *root.children(recursive=True)))


def _share_of(process: int) -> int:
    """PSS; 0 of a process that ended meanwhile."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    match = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _compare_ends(samples: list[tuple[float, int]]) -> Growth:
    """Medians at the beginning and at the end."""
    count = max(1, round(len(samples) * _COMPARED_SHARE))
    sizes = [size for _, size in samples]
    before, after = statistics.median(sizes[:count]), statistics.median(sizes[-count:])
    return {
        "before_bytes": round(before),
        "after_bytes": round(after),
        "peak_bytes": max(sizes),
        "growth": round(after / before - 1, 5),
        "samples": [(round(second, 1), size) for second, size in samples],
    }


def read_metrics(url: str, model: str) -> dict[str, float]:
    """A model's own metrics by name; histograms as their sum and count."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  the server started here
        text = answer.read().decode()
    lines = re.findall(rf'^(nmexport_\w+){{model="{re.escape(model)}"}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in lines}


def _work_done(before: dict[str, float], after: dict[str, float], seconds: float) -> WorkDone:
    def growth_of(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    def mean(name: str) -> float | None:
        count = growth_of(f"{name}_count")
        return round(growth_of(f"{name}_sum") / count, 2) if count else None

    ends = {"finished": names.FINISHED, "cancelled": names.CANCELLED, "failed": names.FAILED}
    return {
        "seconds": round(seconds, 1),
        "requests": {how: int(growth_of(name)) for how, name in ends.items()},
        "tokens_per_s": round(growth_of(names.GENERATED_TOKENS) / seconds, 2),
        "mean_ttft_ms": mean(names.FIRST_WAIT),
        "mean_itl_ms": mean(names.NEXT_WAIT),
    }


def _wait_until_idle(server: Server, model: str) -> dict[str, int]:
    """Wait until the server is idle, and return what it still holds."""
    until = time.monotonic() + _IDLE_SECONDS
    while True:
        known = read_metrics(server.addresses.metrics, model)
        held = {
            "requests": int(known.get(names.RUNNING, 0) + known.get(names.WAITING, 0)),
            "cache_bytes": int(known.get(names.CACHE_BYTES, 0)),
        }
        if not any(held.values()) or time.monotonic() > until:
            return held
        time.sleep(0.1)
