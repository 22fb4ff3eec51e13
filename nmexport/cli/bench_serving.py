"""`nmexport bench serve` and `nmexport bench soak`: a server's load, timed and over time."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
from nmexport.cli.output import console, emit_json, figure, progress, size, table, wants_json
from nmexport.cli.verb import UserPath, Verb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nmexport.bench.serving import Perplexity, Row, Through
    from nmexport.bench.soak import Soaked
    from nmexport.cli.request import Request
    from nmexport.serving.launch import Installation, Server

_server_option = click.option(
    "--server",
    type=UserPath(path_type=Path, dir_okay=False),
    help="tritonserver to start.  [default: as `nmexport serve`]",
)


@click.command(
    "serve", cls=Verb, short_help="Time the dense and the sparse model under a server's load."
)
@click.option(
    "--clients",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 4),
    show_default=True,
    help="Concurrent clients (closed loop). Repeatable.",
)
@click.option(
    "--requests", type=click.IntRange(1), default=8, show_default=True, help="Requests in a round."
)
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--output-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--slots",
    type=click.IntRange(1),
    help="Slots of the server on a GPU, which are the rows of every step.  [default: most clients]",
)
@click.option(
    "--through-triton", is_flag=True, help="Also time the packaged model in a server, over HTTP."
)
@_server_option
@takes()
@click.pass_context
def serve_command(
    ctx: click.Context,
    *,
    asked: Request,
    clients: tuple[int, ...],
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    slots: int | None,
    through_triton: bool,
    server: Path | None,
) -> None:
    """Put a server's load on the dense and the sparse model of a work directory, in turns.

    The load goes to the scheduler that the packaged model runs, within this process; with
    --through-triton also to a server, whose clients see what Triton and HTTP add.
    """
    from nmexport.bench.serving import Load, bench_serve

    work = asked.existing_work()
    work.require("engine")
    loads = [
        Load(
            concurrency=count,
            requests=max(requests, count),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )
        for count in clients
    ]
    with _through(work.root, server) if through_triton else contextlib.nullcontext() as through:
        outcome = bench_serve(
            work.root,
            loads=loads,
            rounds=rounds,
            slots=slots,
            through=through,
            progress=progress(),
        )
    if wants_json(ctx):
        emit_json({"work": str(work.root), **outcome.as_json()})
        return
    title = (
        f"{prompt_tokens} prompt and {output_tokens} output tokens, {rounds} rounds each, "
        f"interleaved, {outcome.runtime} on {outcome.device}"
    )
    columns = ("", "tokens/s", "TTFT p50 ms", "p99 ms", "ITL p50 ms", "p99 ms", "speed")
    cost = outcome.perplexity
    rows = [_row(row, side, cost) for row in outcome.results for side in row.sides]
    out = console()
    out.print(table(title, (*columns, "perplexity"), rows))
    if cost is not None:
        out.print(f"perplexity: the report's, on {cost.dataset}")


def _row(row: Row, side: str, cost: Perplexity | None) -> tuple[object, ...]:
    times = row.sides[side]
    waits = (times.ttft.p50_ms, times.ttft.p99_ms, times.itl.p50_ms, times.itl.p99_ms)
    perplexity = None if cost is None else cost.of(side)
    return (
        f"{row.load.concurrency} clients, {side}",
        figure(times.tokens_per_s, 1),
        *(figure(wait, 1) for wait in waits),
        figure(row.speedup, 2, "x") if side == "sparse" else None,
        None if perplexity is None else figure(perplexity, 1),
    )


@contextlib.contextmanager
def _through(folder: Path, given: Path | None) -> Iterator[Through]:
    from nmexport.bench.serving import Through
    from nmexport.serving import launch

    with _start(folder, launch.find_server(given)) as (server, model):
        yield Through(url=server.addresses.http, model=model)


@contextlib.contextmanager
def _start(folder: Path, installation: Installation) -> Iterator[tuple[Server, str]]:
    """Start a server on the text model of a package; its messages are only shown on an error."""
    from nmexport.serving import launch
    from nmexport.serving.addresses import Addresses
    from nmexport.serving.repository import REPOSITORY

    package = launch.package_folder(folder)
    models = launch.models_of(package / REPOSITORY)
    texts = [name for name, is_plan in models.items() if not is_plan]
    with (
        tempfile.TemporaryFile() as log,
        launch.Server.start(
            package / REPOSITORY,
            addresses=Addresses.unused(),
            installation=installation,
            models=texts,
            output=log,
        ) as server,
    ):
        server.wait_ready()
        yield server, texts[0]


@click.command("soak", cls=Verb, short_help="Watch a server's memory under a long load.")
@click.argument("folder", required=False, type=UserPath(path_type=Path, exists=True))
@click.option("--seconds", type=click.IntRange(10), default=300, show_default=True)
@click.option(
    "--warmup-seconds",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Seconds of load before memory is measured.",
)
@click.option("--clients", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--cancel-every",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    help="Cancel every Nth request mid-stream.",
)
@click.option(
    "--max-growth",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="Exit 3 if memory grows by a larger share, or if anything is still held at the end.",
)
@click.option(
    "--perf-analyzer",
    type=UserPath(path_type=Path, dir_okay=False),
    help="Make the load with this program, over gRPC, next to one client that always cancels.",
)
@_server_option
@takes()
@click.pass_context
def soak_command(
    ctx: click.Context,
    *,
    asked: Request,
    folder: Path | None,
    seconds: int,
    warmup_seconds: int,
    clients: int,
    cancel_every: int,
    max_growth: float,
    perf_analyzer: Path | None,
    server: Path | None,
) -> None:
    """Start a server on FOLDER, a work directory or a package, and watch its memory under a load.

    Compares the medians of the first and the last tenth of the time, over all processes of the
    server.
    """
    from nmexport.bench.perf_analyzer import PerfAnalyzer
    from nmexport.bench.soak import Soak, soak
    from nmexport.errors import GateFailed
    from nmexport.serving import launch

    where = folder or asked.existing_work().root
    installation = launch.find_server(server)
    analyzer = PerfAnalyzer(perf_analyzer, installation) if perf_analyzer else None
    load = Soak(
        seconds=seconds, warmup_seconds=warmup_seconds, clients=clients, cancel_every=cancel_every
    )
    with _start(where, installation) as (running, model):
        outcome = soak(running, model, load, analyzer=analyzer, progress=progress())
    if wants_json(ctx):
        emit_json({"folder": str(where), "model": model, **outcome})
    else:
        _show_soak(outcome)
    held = {name: count for name, count in outcome["left_over"].items() if count}
    growth = outcome["memory"]["growth"]
    if held:
        raise GateFailed(f"the server still holds after the load: {held}")
    if growth > max_growth:
        raise GateFailed(f"memory grew by {growth:.2%}, at most {max_growth:.2%} is allowed")


def _show_soak(outcome: Soaked) -> None:
    memory, load = outcome["memory"], outcome["load"]
    rows = [
        ("memory after warm-up", size(memory["before_bytes"])),
        ("memory at the end", size(memory["after_bytes"])),
        ("growth", f"{memory['growth']:+.2%}"),
        ("peak", size(memory["peak_bytes"])),
        *((f"requests {how}", count) for how, count in outcome["requests"].items()),
        ("tokens/s", figure(outcome["tokens_per_s"], 1)),
        ("mean TTFT ms", figure(outcome["mean_ttft_ms"], 1)),
        ("mean ITL ms", figure(outcome["mean_itl_ms"], 1)),
        ("held after the load", f"{outcome['left_over']['requests']} requests"),
    ]
    out = console()
    out.print(
        f"{load['clients']} clients of {outcome['by']} for {outcome['seconds']:.0f} s, "
        f"after {load['warmup_seconds']:.0f} s of warm-up"
    )
    out.print(table(None, ("", ""), rows))
