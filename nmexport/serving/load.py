"""Serving throughput and latency, dense beside sparse: the same load on both, in turns.

The load goes to the scheduler that a server runs, without the network: Triton's share, well under a
millisecond a response, is the same for both sides.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.serving import metrics as names
from nmexport.serving.options import GenerationOptions
from nmexport.serving.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from nmexport.progress import Progress
    from nmexport.runtimes.session import Extendable
    from nmexport.serving.scheduler import Outcome, Usage

SIDES = ("dense", "sparse")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the clients ask, all the same way."""

    concurrency: int
    """Clients; each asks again as soon as it is answered."""
    requests: int
    """Of all clients together, in one round."""
    prompt_tokens: int
    output_tokens: int
    prefill_chunk: int = 64


class _Timings:
    """Metrics that keep every observation."""

    def __init__(self) -> None:
        self.observed: dict[str, list[float]] = {names.FIRST_WAIT: [], names.NEXT_WAIT: []}

    def add(self, name: str, amount: float = 1.0) -> None:
        """Counters are not wanted."""

    def set(self, name: str, value: float) -> None:
        """Gauges neither."""

    def observe(self, name: str, value: float) -> None:
        """Keep what is timed."""
        if name in self.observed:
            self.observed[name].append(value)


@dataclass(eq=False)
class _Client:
    """Waits for one answer."""

    is_done: bool = False
    problem: str | None = None

    def text(self, piece: str, usage: Usage) -> None:
        """Read it."""

    def done(self, outcome: Outcome) -> None:
        """Ask again, soon."""
        del outcome
        self.is_done = True

    def failed(self, problem: str) -> None:
        """Keep why."""
        self.problem = problem

    def is_cancelled(self) -> bool:
        """Never."""
        return False

    def abandoned(self) -> None:
        """Never called."""


@dataclass
class _Rounds:
    """What the rounds of one side gave."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    next_ms: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(statistics.median(self.tokens_per_s), 2),
            "ttft": _percentiles(self.first_ms),
            "itl": _percentiles(self.next_ms),
        }


def bench_serve(
    work: Path,
    *,
    loads: Sequence[Load],
    rounds: int = 5,
    seed: int = 0,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Put each load on the dense and the sparse model of a work directory, in turns.

    Returns:
        One row a load: the load, `rounds`, and for both sides `tokens_per_s` (median of the
        rounds), `ttft` and `itl` (`p50_ms`, `p90_ms`, `p99_ms` over all requests), and `speedup`.

    Raises:
        ArtifactError: if the work directory holds no engine, or one that cannot be opened.
        EnvironmentFault: if the engine needs a native library that is missing here.
    """
    from nmexport.runtimes.onnxruntime import OrtSession, read_engine
    from nmexport.serving.tokenizer import ServingTokenizer

    engine = work / "engine" / "current"
    decode = ServingTokenizer(read_engine(engine).model.parent).decode
    with (
        OrtSession.from_engine(engine, dense=True) as dense,
        OrtSession.from_engine(engine) as sparse,
    ):
        sessions: dict[str, Extendable] = {"dense": dense, "sparse": sparse}
        return [
            compare(sessions, load, decode=decode, rounds=rounds, seed=seed, progress=progress)
            for load in loads
        ]


def compare(
    sessions: Mapping[str, Extendable],
    load: Load,
    *,
    decode: Callable[[Sequence[int]], str],
    rounds: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """One row of `bench_serve`: warm-up, then rounds in turns, each side first every other time."""
    measured = {side: _Rounds() for side in SIDES}
    for side in SIDES:
        _round(sessions[side], load, decode, seed)
    steps = range(rounds)
    label = f"serve: {load.concurrency} clients"
    for index in progress.track(steps, label=label, total=rounds):
        for side in SIDES if index % 2 == 0 else reversed(SIDES):
            seconds, timings = _round(sessions[side], load, decode, seed + 1 + index)
            tokens = load.requests * load.output_tokens
            measured[side].tokens_per_s.append(tokens / seconds)
            measured[side].first_ms += timings.observed[names.FIRST_WAIT]
            measured[side].next_ms += timings.observed[names.NEXT_WAIT]
    row: dict[str, Any] = {side: measured[side].as_dict() for side in SIDES}
    speedup = row["sparse"]["tokens_per_s"] / row["dense"]["tokens_per_s"]
    return {**vars(load), "rounds": rounds, **row, "speedup": round(speedup, 3)}


def _round(
    session: Extendable, load: Load, decode: Callable[[Sequence[int]], str], seed: int
) -> tuple[float, _Timings]:
    """Run all requests once; seconds and every wait."""
    rng = np.random.default_rng(seed)
    timings = _Timings()
    context = load.prompt_tokens + load.output_tokens
    scheduler = Scheduler(
        session,
        decode=decode,
        end_tokens=frozenset(),  # every answer is equally long
        limits=Limits(
            context_tokens=context,
            cache_bytes=context * load.concurrency * session.cache_bytes_per_token,
            slots=load.concurrency,
            prefill_chunk=load.prefill_chunk,
        ),
        metrics=timings,
    )
    options = GenerationOptions(max_tokens=load.output_tokens)

    def ask() -> _Client:
        client = _Client()
        prompt = rng.integers(session.vocabulary_size, size=load.prompt_tokens).tolist()
        scheduler.submit(prompt, options, client)
        return client

    began = time.perf_counter()
    asked = min(load.concurrency, load.requests)
    clients = [ask() for _ in range(asked)]
    while clients:
        scheduler.step()
        failed = next((client.problem for client in clients if client.problem), None)
        if failed is not None:
            raise RuntimeError(failed)  # a load that fails measures nothing
        done = [client for client in clients if client.is_done]
        for client in done:
            clients.remove(client)
            if asked < load.requests:
                clients.append(ask())
                asked += 1
    return time.perf_counter() - began, timings


def _percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    return {
        f"p{rank}_ms": round(float(np.percentile(times_ms, rank)), 3) if times_ms else 0.0
        for rank in (50, 90, 99)
    }
