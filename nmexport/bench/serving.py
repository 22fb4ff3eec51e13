"""Serving throughput and latency, dense next to sparse: the same load on both, in turns.

The load goes to the scheduler that a server runs, within this process, so that dense and sparse
differ in nothing else. What Triton and the network add is a side of its own: the packaged sparse
model in a real server, asked over HTTP, in turns with the others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nmexport import environment
from nmexport.bench.context import check_context
from nmexport.bench.http_load import Ask, drive
from nmexport.bench.soak import text_of
from nmexport.environment import device_name
from nmexport.errors import ArtifactError
from nmexport.generation.options import GenerationOptions
from nmexport.generation.tokenizer import Tokenizer
from nmexport.report.model import read_report
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_for_serving
from nmexport.runtimes.slots import SlotRoom
from nmexport.serving import metrics as names
from nmexport.serving.limits import Limits
from nmexport.serving.scheduler import Scheduler
from nmexport.timing import interleave, median, percentiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from nmexport.generation.token_scores import TokenScore
    from nmexport.progress import Progress
    from nmexport.runtimes.session import Session
    from nmexport.serving.request import Outcome, Usage

SIDES = ("dense", "sparse")
THROUGH = "sparse through Triton"
"""The side whose clients ask a server; its waits are those between pieces of text."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load that clients put on a server."""

    concurrency: int
    """Clients; each asks again as soon as it is answered."""
    requests: int
    """Number of requests in one round, of all clients together."""
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

    def text(self, piece: str, usage: Usage, scores: Sequence[TokenScore]) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Quantiles over all requests."""

    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Waits:
        """Quantiles of the waits; zeros where nobody waited."""
        values = percentiles(times_ms, (50, 90, 99)) if times_ms else (0.0, 0.0, 0.0)
        p50, p90, p99 = (round(value, 3) for value in values)
        return cls(p50_ms=p50, p90_ms=p90, p99_ms=p99)


@dataclass(frozen=True, kw_only=True)
class SideTimes:
    """One side under one load."""

    tokens_per_s: float
    """Median of the rounds."""
    ttft: Waits
    itl: Waits


@dataclass(frozen=True, kw_only=True)
class Row:
    """All sides under one load."""

    load: Load
    rounds: int
    sides: Mapping[str, SideTimes]
    speedup: float

    def as_json(self) -> dict[str, object]:
        """JSON values, all on one level: the load, each side by its name, and the speed-up."""
        sides = {name: asdict(side) for name, side in self.sides.items()}
        return {**vars(self.load), "rounds": self.rounds, **sides, "speedup": self.speedup}


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of each side, from the work directory's report."""

    dataset: str | None
    dense: float | None
    sparse: float

    def of(self, side: str) -> float | None:
        """A side's; none of a server's, which runs the sparse model."""
        return {"dense": self.dense, "sparse": self.sparse}.get(side)


@dataclass(frozen=True, kw_only=True)
class ServingTimes:
    """The measurements of `bench_serve`."""

    runtime: str
    device: str
    perplexity: Perplexity | None
    """None where the work directory has no report."""
    results: tuple[Row, ...]

    def as_json(self) -> dict[str, object]:
        """JSON values."""
        return {
            "runtime": self.runtime,
            "device": self.device,
            "perplexity": None if self.perplexity is None else vars(self.perplexity),
            "results": [row.as_json() for row in self.results],
        }


@dataclass
class _Rounds:
    """Measurements of one side, round by round."""

    tokens_per_s: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    next_ms: list[float] = field(default_factory=list)

    def summary(self) -> SideTimes:
        return SideTimes(
            tokens_per_s=round(median(self.tokens_per_s), 2),
            ttft=Waits.of(self.first_ms),
            itl=Waits.of(self.next_ms),
        )


@dataclass(frozen=True, kw_only=True)
class Through:
    """A ready server on the packaged model."""

    url: str
    model: str


_Round = tuple[float, int, dict[str, list[float]]]
"""Seconds, tokens, and every wait in ms by the metric's name."""
_Side = Callable[[Load, int], _Round]
"""Runs a load with a seed once."""


def bench_serve(
    work: Path,
    *,
    loads: Sequence[Load],
    rounds: int = 5,
    seed: int = 0,
    slots: int | None = None,
    through: Through | None = None,
    progress: Progress,
) -> ServingTimes:
    """Put each load on the dense and the sparse model of a work directory, in turns.

    Args:
        work: The work directory.
        loads: What to ask.
        rounds: Counted rounds of each load and side; one more warms up.
        seed: Of the random prompts.
        slots: Of a server on a GPU, whatever the load; None is the most clients.
        through: A server whose clients are a side, too.
        progress: Where to count.

    Returns:
        One row a load, with the runtime and device that it was put on.

    Raises:
        ArtifactError: if the work directory holds no engine, or one that cannot be opened.
        EnvironmentFault: if the engine needs a native library that is missing here.
    """
    folder = work / "engine" / "current"
    engine = read_engine(folder)
    longest = max(load.prompt_tokens + load.output_tokens for load in loads)
    check_context(
        engine.model.parent, longest, options="--prompt-tokens and --output-tokens together"
    )
    tokenizer = Tokenizer(engine.model.parent)
    room = SlotRoom(slots=slots or max(load.concurrency for load in loads), tokens=longest)
    with (
        open_for_serving(folder, room, side="dense") as dense,
        open_for_serving(folder, room) as sparse,
    ):
        sides = {
            "dense": _within(dense, tokenizer.decode),
            "sparse": _within(sparse, tokenizer.decode),
        }
        if through is not None:
            sides[THROUGH] = _through(through, tokenizer)
        return ServingTimes(
            runtime=sparse.runtime,
            device=device_name(environment.probe(), on_gpu=engine.provider == "cuda"),
            perplexity=_perplexity(work / "report.json"),
            results=tuple(
                compare(sides, load, rounds=rounds, seed=seed, progress=progress) for load in loads
            ),
        )


def _perplexity(report: Path) -> Perplexity | None:
    try:
        accuracy = read_report(report).accuracy
    except ArtifactError:
        return None  # verify has not run
    if accuracy.sparse.perplexity is None:
        return None
    return Perplexity(
        dataset=accuracy.dataset,
        dense=accuracy.dense.perplexity,
        sparse=accuracy.sparse.perplexity,
    )


def compare(
    sides: Mapping[str, _Side], load: Load, *, rounds: int, seed: int, progress: Progress
) -> Row:
    """One row of `bench_serve`: warm-up, then rounds in turns, each side first in its turn."""
    label = f"serve: {load.concurrency} clients"

    def with_seeds(run: _Side) -> Callable[[], _Round]:
        seeds = itertools.count(seed)
        return lambda: run(load, next(seeds))

    rounds_of = interleave(
        {side: with_seeds(run) for side, run in sides.items()},
        progress.track(range(rounds), label=label, total=rounds),
    )
    measured = {side: _Rounds() for side in sides}
    for side, results in rounds_of.items():
        for seconds, tokens, waits in results:
            measured[side].tokens_per_s.append(tokens / seconds)
            measured[side].first_ms += waits[names.FIRST_WAIT]
            measured[side].next_ms += waits[names.NEXT_WAIT]
    times = {side: measured[side].summary() for side in sides}
    speedup = times["sparse"].tokens_per_s / times["dense"].tokens_per_s
    return Row(load=load, rounds=rounds, sides=times, speedup=round(speedup, 3))


def _within(session: Session, decode: Callable[[Sequence[int]], str]) -> _Side:
    """A scheduler of this process."""

    def run(load: Load, seed: int) -> _Round:
        seconds, timings = _round(session, load, decode, seed)
        return seconds, load.requests * load.output_tokens, timings.observed

    return run


def _through(server: Through, tokenizer: Tokenizer) -> _Side:
    """A server's clients; an answer may end before it is as long as the others'."""

    def run(load: Load, seed: int) -> _Round:
        del seed  # what a prompt says makes no difference to the time
        fields = {
            "text_input": _text_of(tokenizer, load.prompt_tokens),
            "max_tokens": load.output_tokens,
            "temperature": 0.0,
        }
        began = time.perf_counter()
        answers = drive(
            server.url,
            server.model,
            [Ask(fields=fields)] * load.requests,
            clients=load.concurrency,
        )
        seconds = time.perf_counter() - began
        waits = {
            names.FIRST_WAIT: [answer.first_ms for answer in answers],
            names.NEXT_WAIT: [wait for answer in answers for wait in answer.next_ms],
        }
        return seconds, sum(answer.tokens for answer in answers), waits

    return run


def _text_of(tokenizer: Tokenizer, tokens: int) -> str:
    """A text of so many tokens, or of as few more as there is one."""
    words = 1
    while len(tokenizer.encode(text_of(words))) < tokens:
        words += 1
    return text_of(words)


def _round(
    session: Session, load: Load, decode: Callable[[Sequence[int]], str], seed: int
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
            cache_bytes=session.cache_bytes(context) * load.concurrency,
            slots=min(load.concurrency, session.limits.batch or load.concurrency),
            prefill_chunk=session.chunk or load.prefill_chunk,
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
