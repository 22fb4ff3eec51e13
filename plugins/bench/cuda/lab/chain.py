"""Four linears of several layers, each fed by the one before: what a model's decode step launches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from arguments import Layer, plan_of
from cases import SHAPES
from library import stream, sweep_entry

from timing import capture, time_interleaved

if TYPE_CHECKING:
    from arguments import LinearArgs, Plan
    from library import Lab

    from timing import Launch

ORDER = ("qkv", "o", "gate_up", "down")
REPEATS = 6


def chain(lab: Lab, layers: int, rounds: int) -> None:
    """qkv, o, gate_up, down of distinct layers; selection is inside the kernel."""
    model = Chain(lab, layers)
    fresh = torch.randn_like(model.buffers["down"])

    def graph(launch: Launch) -> torch.cuda.CUDAGraph:
        def reset() -> None:
            model.buffers["down"].copy_(fresh)

        return capture(launch, len(ORDER) * layers * REPEATS, reset)

    graphs = {
        "dense cublasLt": graph(model.cublaslt()),
        "dense own": graph(model.swept("dense", 16)),
        "sparse best": graph(model.swept("sparse", 8)),
        "sparse product": graph(model.product()),
    }
    lab.results["chain"] = time_interleaved(graphs, layers * REPEATS, rounds)


class Chain:
    """Weights of every layer, and buffers by which each linear reads what the one before wrote."""

    def __init__(self, lab: Lab, layers: int) -> None:
        self.lab = lab
        self.weights = [{name: _weights(name) for name in ORDER} for _ in range(layers)]
        self.buffers = {
            name: torch.randn(1, SHAPES[name][1], device="cuda", dtype=torch.bfloat16)
            for name in ORDER
        }
        self.inputs = {
            "qkv": self.buffers["down"],
            "o": self.buffers["qkv"][:, : SHAPES["o"][0]],
            "gate_up": self.buffers["o"],
            "down": self.buffers["gate_up"][:, : SHAPES["down"][0]],
        }

    def arguments(self, n: int) -> list[LinearArgs]:
        """The arguments of every linear in turn, N of 16 kept."""
        return [
            Layer(self.inputs[name], layer[name], n, 16).decode_args(self.buffers[name])
            for layer in self.weights
            for name in ORDER
        ]

    def product(self) -> Launch:
        """The decode kernel with the plans that the product's table gives."""
        calls = self.arguments(8)
        return lambda i: self.lab.call("labDecode", calls[i % len(calls)])

    def swept(self, kind: str, n: int) -> Launch:
        """The decode kernel with the sweep's best plan of each shape."""
        best = self.lab.results["best"]
        calls = self.arguments(n)
        plans: list[Plan] = [plan_of(best[name][kind][0]) for name in ORDER]
        entries = [sweep_entry(plan) for plan in plans]

        def launch(i: int) -> None:
            which = i % len(ORDER)
            self.lab.call(entries[which], calls[i % len(calls)], plans[which])

        return launch

    def cublaslt(self) -> Launch:
        """cuBLASLt's best algorithm of each shape, in the layout that was faster."""
        lab, problems = self.lab, {}
        for name in ORDER:
            record = lab.results["cublaslt"]["x".join(map(str, SHAPES[name]))]
            layout = min(record, key=lambda k: record[k]["us"])
            problem = lab.blaslt.ltOpen(1, *SHAPES[name], int(layout == "OK"), 400)
            problems[name] = (problem, record[layout]["best"], layout)
        stored = [
            {
                name: w.t().contiguous() if problems[name][2] == "OK" else w
                for name, w in layer.items()
            }
            for layer in self.weights
        ]

        def launch(i: int) -> None:
            name = ORDER[i % len(ORDER)]
            problem, algorithm, _ = problems[name]
            w = stored[i // len(ORDER) % len(stored)][name]
            x, y = self.inputs[name].data_ptr(), self.buffers[name].data_ptr()
            status = lab.blaslt.ltRun(problem, algorithm, x, w.data_ptr(), y, stream())
            if status != 0:
                raise RuntimeError(f"cublasLt {status}")

        return launch


def _weights(name: str) -> torch.Tensor:
    w = torch.randn(*SHAPES[name], device="cuda", dtype=torch.bfloat16)
    return w * (1.0 / math.sqrt(SHAPES[name][0]))
