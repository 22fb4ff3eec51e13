"""CUDA graphs of many launches, timed in turns over weights that are never in L2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from arguments import Layer, Plan
from library import Lab, stream, sweep_entry

ROTATED_BYTES = 600 << 20
"""Weights that launches go through in turn, so that none finds its rows in L2."""

Launch = Callable[[int], object]
"""Puts the i-th launch on the current stream."""


def capture(
    launch: Launch, launches: int, reset: Callable[[], None] | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of `launches` calls; `reset` (one small copy) goes first, so that values stay those of real data."""
    torch.cuda.synchronize()  # what the launches read may still be in the making on another stream
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        if reset is not None:
            reset()
        for i in range(launches):
            launch(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def time_interleaved(
    graphs: dict[str, torch.cuda.CUDAGraph], launches: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Microseconds per launch: median, p10, p90 over rounds; one replay of each graph per round."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
        name: [] for name in graphs
    }
    for _ in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = timed_event(), timed_event()
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    out = {}
    for name, pairs in events.items():
        us = torch.tensor([a.elapsed_time(b) * 1000 / launches for a, b in pairs[2:]])
        q = torch.quantile(us, torch.tensor([0.1, 0.5, 0.9]))
        out[name] = {"us": q[1].item(), "p10": q[0].item(), "p90": q[2].item()}
    return out


def timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class Bench:
    """Rotating weights of one shape; each launch reads what the launch before wrote, as in a model.

    So the weights are cold and the activations are in L2; the mask differs from launch to launch.
    """

    channels: int
    outputs: int
    budget_us: float = 3000.0

    def __post_init__(self) -> None:
        size = self.channels * self.outputs * 2
        self.copies = max(3, math.ceil(ROTATED_BYTES / size))
        self.launches = (
            2 * self.copies * max(1, round(self.budget_us / (size / 3e6) / self.copies / 2))
        )
        scale = 1 / math.sqrt(self.channels)
        self.w = [
            (torch.randn(self.channels, self.outputs, device="cuda", dtype=torch.bfloat16) * scale)
            for _ in range(self.copies)
        ]
        longest = max(self.channels, self.outputs)
        self.buffers = [
            torch.randn(1, longest, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]
        self.fresh = torch.randn(1, longest, device="cuda", dtype=torch.bfloat16)
        self.x = [b[:, : self.channels] for b in self.buffers]
        self.y = [b[:, : self.outputs] for b in reversed(self.buffers)]

    def reset(self) -> None:
        self.buffers[0].copy_(self.fresh)

    def graph(self, launch: Launch) -> torch.cuda.CUDAGraph:
        return capture(launch, self.launches, self.reset)

    def sparse(
        self, lab: Lab, plan: Plan | None, n: int = 8, order: torch.Tensor | None = None
    ) -> Launch:
        arguments = [
            Layer(self.x[i % 2], self.w[i % self.copies], n, 16, channel_order=order).decode_args(
                self.y[i % 2]
            )
            for i in range(2 * self.copies)
        ]
        if order is not None:
            return lambda i: lab.call("labDecodePlan", arguments[i % len(arguments)], plan)
        if plan is None:
            return lambda i: lab.call("labDecode", arguments[i % len(arguments)])
        name = sweep_entry(plan)
        return lambda i: lab.call(name, arguments[i % len(arguments)], plan)

    def blaslt(self, lab: Lab, problem: int, algorithm: int, weights: list[torch.Tensor]) -> Launch:
        def launch(i: int) -> None:
            w = weights[i % self.copies]
            status = lab.blaslt.ltRun(
                problem,
                algorithm,
                self.x[i % 2].data_ptr(),
                w.data_ptr(),
                self.y[i % 2].data_ptr(),
                stream(),
            )
            if status != 0:
                raise RuntimeError(f"cublasLt {status}")

        return launch
