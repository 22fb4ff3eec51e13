"""Speed of NMLinear on a CUDA GPU, and the break-even table that its kernels choose by.

Everything runs through ONNX Runtime's CUDA provider: a graph of as many products as their weights
exceed the L2 cache, captured as a CUDA graph and replayed, the sides in turn, timed by the clock.

| side | what it is |
|---|---|
| `matmul` | ONNX Runtime's MatMul |
| `dense` | our decode kernel with all rows kept |
| `sparse` | our decode kernel, 8 of 16, with the fastest plan found |
| `masked` | a mask, then cuBLASLt: the other way to what `sparse` computes |
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import EnvironmentFault, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

Dtype = Literal["float16", "float32"]
"""bfloat16 reads the same bytes as float16 and shares its rows."""
Side = Literal["matmul", "dense", "sparse", "masked"]
SIDES: tuple[Side, ...] = ("matmul", "dense", "sparse", "masked")
MISTRAL_SHAPES = ((4096, 4096), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096))
"""(in_features, out_features) of Mistral-7B's and Llama-3-8B's linears, single and fused."""
ROTATED_BYTES = 600 << 20
"""Weights of one side together; several times the L2 cache of any GPU so far."""
_MAX_TOKENS = 4
"""Of the decode kernel."""
_MAX_CLUSTER = 8
_CLUSTERS_SINCE = 90
_ITEM_BYTES = {"float16": 2, "float32": 4}
_ONNX_TYPES = {"float32": 1, "float16": 10}
_KEEP, _GROUP = 8, 16
_MIN_COPIES, _MAX_COPIES = 3, 64


@dataclass(frozen=True)
class Plan:
    """How the decode kernel cuts its work; DecodePlan of nm_cuda.h, field for field."""

    lanes: int
    vectors: int
    warps: int
    unroll: int
    resident: int
    cluster: int

    def fields(self) -> tuple[int, ...]:
        """In the order of a table row; the next kernel may start at once."""
        return (
            self.lanes,
            self.vectors,
            self.warps,
            self.unroll,
            1,
            self.resident,
            self.cluster,
            0,
        )


@dataclass(frozen=True)
class Device:
    """What a table row says of the chip."""

    compute_capability: int
    multiprocessors: int


class PlanLibrary:
    """The native library's functions for measured plans."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            EnvironmentFault: if it carries no CUDA kernels, or there is no GPU.
        """
        self._library = ctypes.CDLL(str(path))
        if not hasattr(self._library, "nmexport_cuda_device"):
            raise EnvironmentFault(
                f"{path} carries no CUDA kernels.",
                fix="build it with them: NMEXPORT_CUDA=1 python -m pip install --no-deps -e .",
            )
        self._library.nmexport_cuda_device.restype = ctypes.c_char_p
        self._library.nmexport_cuda_shapes.restype = ctypes.c_char_p
        self._library.nmexport_use_cuda_plans.argtypes = [ctypes.c_char_p]
        answer = self._library.nmexport_cuda_device()
        if not answer:
            raise EnvironmentFault("There is no CUDA GPU here.", fix="`nmexport doctor` says more")
        traits = json.loads(answer)
        self.device = Device(traits["compute_capability"], traits["multiprocessors"])

    def plans(self, in_features: int) -> Iterator[Plan]:
        """Every plan worth trying on this device: a warp gets a group of channels at least."""
        clusters = _MAX_CLUSTER if self.device.compute_capability >= _CLUSTERS_SINCE else 1
        for shape in json.loads(self._library.nmexport_cuda_shapes()):
            for cluster in range(1, clusters + 1):
                lanes, vectors, warps, unroll, resident = shape
                plan = Plan(lanes, vectors, warps, unroll, resident, cluster)
                if cluster * plan.warps * _GROUP <= in_features:
                    yield plan

    def use(self, rows: Sequence[str]) -> None:
        """Use a table from now on.

        Raises:
            RecipeError: if a row is malformed.
        """
        fault = self._library.nmexport_use_cuda_plans("\n".join(rows).encode())
        if fault:
            raise RecipeError(f"Line {fault} of the table of CUDA plans is malformed.")


def table_row(
    device: Device,
    problem: Problem,
    plan: Plan,
    *,
    sparse_us: float,
    masked_us: float,
    dense_us: float,
) -> str:
    """One line of a table of plans, as plan_table.h reads it."""
    # 0: bare magnitude without a channel order
    shape = (problem.item_bytes, problem.tokens, problem.in_features, problem.out_features, 0)
    numbers = (device.compute_capability, device.multiprocessors, *shape, *plan.fields())
    times = (f"{value:.2f}" for value in (sparse_us, masked_us, dense_us))
    return ", ".join([*map(str, numbers), *times])


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One linear and token count."""

    in_features: int
    out_features: int
    tokens: int
    dtype: Dtype

    @property
    def item_bytes(self) -> int:
        """Of an element."""
        return _ITEM_BYTES[self.dtype]

    def copies(self, rotated_bytes: int) -> int:
        """Weights that together exceed the cache."""
        wanted = rotated_bytes // (self.in_features * self.out_features * self.item_bytes) + 1
        return min(max(wanted, _MIN_COPIES), _MAX_COPIES)


def bench_cuda(
    shapes: Sequence[tuple[int, int]] = MISTRAL_SHAPES,
    tokens: Sequence[int] = (1, 2, 3, 4),
    *,
    dtype: Dtype = "float16",
    rounds: int = 15,
    rotated_bytes: int = ROTATED_BYTES,
    library: Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time every side on every shape and token count, and find the fastest plans.

    Args:
        shapes: (in_features, out_features) pairs, multiples of 16.
        tokens: 1 to 4: what the decode kernel takes.
        dtype: Of activations and weights.
        rounds: Replays of each side.
        rotated_bytes: Weights of one side together.
        library: The native library; default the installed one.
        note: Told what is being measured.

    Returns:
        JSON values: `device`, `results` (medians in microseconds by side, the plan, `ratio` of
        MatMul to sparse) and `table`, the rows of a table of plans.

    Raises:
        RecipeError: if a shape or token count does not fit.
        EnvironmentFault: if library, provider or GPU are missing.
    """
    from nmexport.runtimes import native

    problems = [
        Problem(in_features=k, out_features=o, tokens=count, dtype=dtype)
        for k, o in shapes
        for count in tokens
    ]
    for problem in problems:
        _check(problem)
    path = library or native.require_library()
    plans = PlanLibrary(path)
    rows = []
    for problem in problems:
        note(f"{problem.in_features}x{problem.out_features}, {problem.tokens} tokens")
        bench = _Bench(problem, path, plans, rotated_bytes)
        rows.append(bench.measure(rounds))
    return {
        "device": vars(plans.device),
        "dtype": dtype,
        "results": rows,
        "table": [row.pop("row") for row in rows],
    }


def _check(problem: Problem) -> None:
    fits = problem.in_features % _GROUP == 0 and problem.out_features % _GROUP == 0
    if min(problem.in_features, problem.out_features) < _GROUP or not fits:
        raise RecipeError(
            f"Shape {problem.in_features}x{problem.out_features} cannot be measured.",
            allowed=f"both positive multiples of {_GROUP}",
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
        self._copies = problem.copies(rotated_bytes)
        self._element = _ONNX_TYPES[problem.dtype]
        scale = problem.in_features**-0.5
        self._weights = [
            self._device_value((problem.in_features, problem.out_features), scale, seed)
            for seed in range(self._copies)
        ]
        self._x = self._device_value((1, problem.tokens, problem.in_features), 1.0, 77)

    def measure(self, rounds: int) -> dict[str, Any]:
        """The best plan, then all sides in turn."""
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
        return {
            **vars(self._problem),
            "plan": vars(plan),
            "us": us,
            "ratio": min(us["matmul"], us["dense"]) / us["sparse"],
            "row": row,
        }

    def _best_plan(self) -> Plan:
        """By trial for one token of a 16-bit type; elsewhere the kernel goes by rule."""
        candidates = list(self._plans.plans(self._problem.in_features))
        if self._problem.tokens > 1 or self._problem.dtype == "float32":
            return candidates[0]
        runs: dict[Plan, Callable[[], None]] = {}
        for plan in candidates:
            runs[plan] = self._runner("sparse", plan)
        us = self._time(runs, 3)
        return min(candidates, key=lambda plan: us[plan])

    def _time(self, runs: Mapping[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
        """Median microseconds of one product."""
        seconds: dict[Any, list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - began)
        return {
            key: statistics.median(times) / self._copies * 1e6 for key, times in seconds.items()
        }

    def _runner(self, side: Side, plan: Plan) -> Callable[[], None]:
        """A call that replays the side's graph, captured under a table that forces its path."""
        import onnxruntime
        from nmexport.runtimes.onnxruntime import open_cuda_graph

        forced = 0.0 if side in {"dense", "sparse"} else 1.0
        row = table_row(
            self._plans.device,
            self._problem,
            plan,
            sparse_us=forced,
            masked_us=1.0 - forced,
            dense_us=1.0,
        )
        self._plans.use([row])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self._library))
        session = open_cuda_graph(product_graph(side, self._problem, self._copies), options)
        binding = session.io_binding()
        binding.bind_ortvalue_input("X", self._x)
        for index, weight in enumerate(self._weights):
            binding.bind_ortvalue_input(f"W{index}", weight)
        for output in session.get_outputs():
            binding.bind_ortvalue_output(output.name, self._output())
        for _ in range(3):  # ONNX Runtime captures the graph in one of its first runs
            session.run_with_iobinding(binding)
        return lambda: session.run_with_iobinding(binding)

    def _output(self) -> Any:
        import onnxruntime

        problem = self._problem
        shape = [1, problem.tokens, problem.out_features]
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, self._element, "cuda", 0)

    def _device_value(self, shape: tuple[int, ...], scale: float, seed: int) -> Any:
        """Random values, a short run of them repeated: their bytes are what is measured."""
        import numpy as np

        import onnxruntime

        run = np.random.default_rng(seed).standard_normal((1 << 20) + 7, dtype=np.float32) * scale
        values = np.resize(run.astype(self._problem.dtype), shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, "cuda", 0)


def product_graph(side: Side, problem: Problem, copies: int) -> bytes:
    """A model with one product for each weight, all of the same input; the weights are inputs."""
    from onnx import helper

    element = _ONNX_TYPES[problem.dtype]
    shape = [problem.in_features, problem.out_features]
    kept = _GROUP if side == "dense" else _KEEP
    nodes = [
        helper.make_node("MatMul", ["X", f"W{i}"], [f"Y{i}"])
        if side == "matmul"
        else helper.make_node(
            "NMLinear", ["X", f"W{i}"], [f"Y{i}"], domain="nmexport", n=kept, m=_GROUP
        )
        for i in range(copies)
    ]
    x_shape = [1, problem.tokens, problem.in_features]
    y_shape = [1, problem.tokens, problem.out_features]
    graph = helper.make_graph(
        nodes,
        "bench",
        [
            helper.make_tensor_value_info("X", element, x_shape),
            *(helper.make_tensor_value_info(f"W{i}", element, shape) for i in range(copies)),
        ],
        [helper.make_tensor_value_info(f"Y{i}", element, y_shape) for i in range(copies)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nmexport", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())
