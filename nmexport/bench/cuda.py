"""Speed of NMLinear on a CUDA GPU, and the break-even table that its kernels choose by.

Everything runs through ONNX Runtime's CUDA provider: a graph of products over weights that together
exceed the L2 cache, each in its turn, captured as a CUDA graph and replayed, the sides in turn,
timed by the clock. It has so many products that starting the replay does not count.

| side | what it is |
|---|---|
| `matmul` | ONNX Runtime's MatMul |
| `dense` | our decode kernel with all rows kept |
| `sparse` | our decode kernel, 8 of 16, with the fastest plan found |
| `masked` | a mask, then cuBLASLt: the other way to what `sparse` computes |

Each shape is measured with a channel order and without: with one, each token is gathered first.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

import onnxruntime
from nmexport.bench.cuda_graphs import ONNX_TYPES, Side, product_graph
from nmexport.bench.cuda_plans import GROUP, Dtype, Plan, PlanLibrary, Problem, table_row
from nmexport.environment import device_name, probe
from nmexport.errors import RecipeError
from nmexport.runtimes import native, onnxruntime_opening
from nmexport.timing import interleave, median, milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


SIDES: tuple[Side, ...] = ("matmul", "dense", "sparse", "masked")
MISTRAL_SHAPES = ((4096, 4096), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096))
"""(in_features, out_features) of Mistral-7B's and Llama-3-8B's linears, single and fused."""
ROTATED_BYTES = 600 << 20
"""Weights of one side together; several times the L2 cache of any GPU so far."""
_MAX_TOKENS = 4
"""Most tokens that the decode kernel takes."""
_MIN_LAUNCHES = 32
"""Fewest launches in a replay, whose start costs as much as one large product."""


class CudaRow(TypedDict):
    """One linear and token count, measured."""

    in_features: int
    out_features: int
    tokens: int
    dtype: Dtype
    grouped: bool
    label: str
    launches: int
    plan: dict[str, int]
    """The fastest."""
    us: dict[Side, float]
    """Medians in microseconds."""
    ratio: float
    """Time of the faster dense product over that of the sparse one."""


class CudaTimes(TypedDict):
    """The measurements of `bench_cuda`."""

    device: dict[str, int]
    gpu: str
    dtype: Dtype
    results: list[CudaRow]
    table: list[str]
    """Rows of a table of plans."""


def bench_cuda(
    shapes: Sequence[tuple[int, int]] = MISTRAL_SHAPES,
    tokens: Sequence[int] = (1, 2, 3, 4),
    *,
    dtype: Dtype = "float16",
    rounds: int = 15,
    rotated_bytes: int = ROTATED_BYTES,
    library: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> CudaTimes:
    """Time every side on every shape and token count, and find the fastest plans.

    Args:
        shapes: (in_features, out_features) pairs, multiples of 16.
        tokens: 1 to 4: what the decode kernel takes.
        dtype: Of activations and weights.
        rounds: Replays of each side.
        rotated_bytes: Weights of one side together.
        library: The native library; default the installed one.
        note: Told what is being measured.

    Raises:
        RecipeError: if a shape or token count does not fit.
        EnvironmentFault: if library, provider or GPU are missing.
    """
    problems = [
        Problem(in_features=k, out_features=o, tokens=count, dtype=dtype, grouped=grouped)
        for k, o in shapes
        for count in tokens
        for grouped in (False, True)
    ]
    for problem in problems:
        _check(problem)
    path = library or native.require_library()
    plans = PlanLibrary(path)
    rows: list[CudaRow] = []
    table: list[str] = []
    for problem in problems:
        note(str(problem))
        row, plan_row = _Bench(problem, path, plans, rotated_bytes).measure(rounds)
        rows.append(row)
        table.append(plan_row)
    return {
        "device": vars(plans.device),
        "gpu": device_name(probe(), on_gpu=True),
        "dtype": dtype,
        "results": rows,
        "table": table,
    }


def _check(problem: Problem) -> None:
    fits = problem.in_features % GROUP == 0 and problem.out_features % GROUP == 0
    if min(problem.in_features, problem.out_features) < GROUP or not fits:
        raise RecipeError(
            f"Shape {problem.in_features}x{problem.out_features} cannot be measured.",
            allowed=f"both positive multiples of {GROUP}",
        )
    if not 1 <= problem.tokens <= _MAX_TOKENS:
        raise RecipeError(
            f"{problem.tokens} tokens cannot be measured.", allowed=f"1 to {_MAX_TOKENS}"
        )


class _Bench:
    """The sides of one problem over the same weights in device memory."""

    def __init__(
        self, problem: Problem, library: Path, plans: PlanLibrary, rotated_bytes: int
    ) -> None:
        self._problem = problem
        self._library = library
        self._plans = plans
        copies = problem.copies(rotated_bytes)
        self._rounds = -(-_MIN_LAUNCHES // copies)
        self._launches = copies * self._rounds
        self._element = ONNX_TYPES[problem.dtype]
        scale = problem.in_features**-0.5
        self._weights = [
            self._device_value((problem.in_features, problem.out_features), scale, seed)
            for seed in range(copies)
        ]
        x_shape = (1, problem.tokens, problem.in_features)
        self._x = [self._device_value(x_shape, 1.0, 1000 + i) for i in range(self._rounds)]

    def measure(self, rounds: int) -> tuple[CudaRow, str]:
        """Find the best plan, time all sides; return the results and a row of the plan table."""
        plan = self._best_plan()
        runs = {side: self._runner(side, plan) for side in SIDES}
        us = self._time(runs, rounds)
        row = table_row(
            self._plans.device,
            self._problem,
            plan,
            sparse_us=us["sparse"],
            masked_us=us["masked"],
            dense_us=min(us["matmul"], us["dense"]),
        )
        problem = self._problem
        measured = CudaRow(
            in_features=problem.in_features,
            out_features=problem.out_features,
            tokens=problem.tokens,
            dtype=problem.dtype,
            grouped=problem.grouped,
            label=str(problem),
            launches=self._launches,
            plan=dict(vars(plan)),
            us=us,
            ratio=min(us["matmul"], us["dense"]) / us["sparse"],
        )
        return measured, row

    def _best_plan(self) -> Plan:
        """Find the best plan by trial for one 16-bit token; elsewhere the kernel goes by rule."""
        candidates = list(self._plans.plans(self._problem.in_features))
        if self._problem.tokens > 1 or self._problem.dtype == "float32":
            return candidates[0]
        runs: dict[Plan, Callable[[], None]] = {}
        for plan in candidates:
            runs[plan] = self._runner("sparse", plan)
        us = self._time(runs, 3)
        return min(candidates, key=lambda plan: us[plan])

    def _time(self, runs: Mapping[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
        """Measure the median microseconds of one product."""
        timed = {key: functools.partial(milliseconds, run) for key, run in runs.items()}
        samples = interleave(timed, range(rounds), warmup=0)  # a captured graph has run
        return {key: median(ms) * 1e3 / self._launches for key, ms in samples.items()}

    def _runner(self, side: Side, plan: Plan) -> Callable[[], None]:
        """Make a call that replays the side's graph, captured under a table that forces a path."""
        forced = 0.0 if side in {"dense", "sparse"} else 1.0
        rows = [
            table_row(
                self._plans.device,
                replace(self._problem, grouped=grouped),
                plan,
                sparse_us=forced,
                masked_us=1.0 - forced,
                dense_us=1.0,
            )
            for grouped in (False, True)
        ]
        self._plans.use(rows)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self._library))
        graph = product_graph(side, self._problem, len(self._weights), self._rounds)
        session = onnxruntime_opening.open_cuda_graph(graph, options)
        binding = session.io_binding()
        for index, x in enumerate(self._x):
            binding.bind_ortvalue_input(f"X{index}", x)
        for index, weight in enumerate(self._weights):
            binding.bind_ortvalue_input(f"W{index}", weight)
        for output in session.get_outputs():
            binding.bind_ortvalue_output(output.name, self._output())
        for _ in range(3):  # ONNX Runtime captures the graph in one of its first runs
            session.run_with_iobinding(binding)
        return lambda: session.run_with_iobinding(binding)

    def _output(self) -> Any:
        problem = self._problem
        shape = [1, problem.tokens, problem.out_features]
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, self._element, "cuda", 0)

    def _device_value(self, shape: tuple[int, ...], scale: float, seed: int) -> Any:
        """Make random values, a short run repeated: only their bytes are measured."""
        run = np.random.default_rng(seed).standard_normal((1 << 20) + 7, dtype=np.float32) * scale
        values = np.resize(run.astype(self._problem.dtype), shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, "cuda", 0)
