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

import ctypes
import functools
import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from onnx import helper, numpy_helper

import onnxruntime
from nmexport.environment import device_name, probe
from nmexport.errors import EnvironmentFault, RecipeError
from nmexport.graph.contract import op_contract
from nmexport.runtimes import native, onnxruntime_session
from nmexport.runtimes.native import CUDA_PLANS_FILE
from nmexport.timing import interleave, median, milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

Dtype = Literal["float16", "float32"]
"""bfloat16 reads the same bytes as float16 and shares its rows."""
Side = Literal["matmul", "dense", "sparse", "masked"]
SIDES: tuple[Side, ...] = ("matmul", "dense", "sparse", "masked")
MISTRAL_SHAPES = ((4096, 4096), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096))
"""(in_features, out_features) of Mistral-7B's and Llama-3-8B's linears, single and fused."""
ROTATED_BYTES = 600 << 20
"""Weights of one side together; several times the L2 cache of any GPU so far."""
_MAX_TOKENS = 4
"""Most tokens that the decode kernel takes."""
_MAX_CLUSTER = 8
_CLUSTERS_SINCE = 90
_ITEM_BYTES = {"float16": 2, "float32": 4}
_ONNX_TYPES = {"float32": 1, "float16": 10}
_KEEP, _GROUP = 8, 16
_ORDER = "channel_order"
_MIN_COPIES, _MAX_COPIES = 3, 64
_MIN_LAUNCHES = 32
"""Fewest launches in a replay, whose start costs as much as one large product."""
_KEY_FIELDS, _ROW_FIELDS = 7, 18
"""Fields of a table row: those that say what was measured, which come first, and all."""


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
    """The GPU that a table row was measured on."""

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
    shape = (problem.item_bytes, problem.tokens, problem.in_features, problem.out_features)
    measured = (device.compute_capability, device.multiprocessors, *shape, int(problem.grouped))
    numbers = (*measured, *plan.fields())
    times = (f"{value:.2f}" for value in (sparse_us, masked_us, dense_us))
    return ", ".join([*map(str, numbers), *times])


def merged_table(old: str, rows: Sequence[str]) -> list[str]:
    """The lines of a table with rows added, each in place of one that measured the same before.

    Raises:
        RecipeError: if a line is no row.
    """
    measured = {_key_of(row): row for row in rows}
    kept = []
    for number, line in enumerate(old.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("//"):
            kept.append(line)
            continue
        try:
            key = _key_of(line)
        except ValueError as error:
            raise RecipeError(f"Line {number} is no row of a table of CUDA plans.") from error
        if key not in measured:
            kept.append(line)
    return [*kept, *measured.values()]


def _key_of(row: str) -> tuple[int, ...]:
    fields = row.split(",")
    if len(fields) != _ROW_FIELDS:
        raise ValueError(row)
    return tuple(int(field) for field in fields[:_KEY_FIELDS])


def check_savable(library: Path) -> None:
    """Refuse before minutes of measuring what could not be saved after.

    Raises:
        EnvironmentFault: if the folder of the native library cannot be written.
    """
    if not os.access(library.parent, os.W_OK):
        raise _unsavable(library, "the folder is not yours to write")


def save_plans(library: Path, rows: Sequence[str]) -> Path:
    """Add rows to the table next to the native library, which every later session reads.

    Raises:
        EnvironmentFault: if the folder cannot be written, or the file there is no such table.
    """
    path = library.with_name(CUDA_PLANS_FILE)
    try:
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        text = "\n".join(merged_table(old, rows)) + "\n"
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except RecipeError as error:
        raise EnvironmentFault(
            f"{path}: {error.problem}", fix="delete the file, and measure again with --save"
        ) from error
    except OSError as error:
        raise _unsavable(library, str(error)) from error
    return path


def _unsavable(library: Path, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"What is measured cannot be saved in {library.parent}: {why}.",
        allowed="a writable installation, such as a virtual environment of your own",
        fix="install nmexport there; --table FILE writes the rows elsewhere, for the record",
    )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One linear and token count."""

    in_features: int
    out_features: int
    tokens: int
    dtype: Dtype
    grouped: bool = False
    """With a channel order."""

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return _ITEM_BYTES[self.dtype]

    def copies(self, rotated_bytes: int) -> int:
        """Weights that together exceed the cache."""
        wanted = rotated_bytes // (self.in_features * self.out_features * self.item_bytes) + 1
        return min(max(wanted, _MIN_COPIES), _MAX_COPIES)

    def __str__(self) -> str:
        """Such as `4096x6144, 2 tokens, channel order`."""
        order = ", channel order" if self.grouped else ""
        return f"{self.in_features}x{self.out_features}, {self.tokens} tokens{order}"


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
        copies = problem.copies(rotated_bytes)
        self._rounds = -(-_MIN_LAUNCHES // copies)
        self._launches = copies * self._rounds
        self._element = _ONNX_TYPES[problem.dtype]
        scale = problem.in_features**-0.5
        self._weights = [
            self._device_value((problem.in_features, problem.out_features), scale, seed)
            for seed in range(copies)
        ]
        x_shape = (1, problem.tokens, problem.in_features)
        self._x = [self._device_value(x_shape, 1.0, 1000 + i) for i in range(self._rounds)]

    def measure(self, rounds: int) -> tuple[CudaRow, str]:
        """The best plan, then all sides in turn; and the row of a table of plans."""
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
        """Measure the median microseconds of one product."""
        timed = {key: functools.partial(milliseconds, run) for key, run in runs.items()}
        samples = interleave(timed, range(rounds), warmup=0)  # a captured graph has run
        return {key: median(ms) * 1e3 / self._launches for key, ms in samples.items()}

    def _runner(self, side: Side, plan: Plan) -> Callable[[], None]:
        """A call that replays the side's graph, captured under a table that forces its path."""
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
        session = onnxruntime_session.open_cuda_graph(graph, options)
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
        """Random values, a short run of them repeated: their bytes are what is measured."""
        run = np.random.default_rng(seed).standard_normal((1 << 20) + 7, dtype=np.float32) * scale
        values = np.resize(run.astype(self._problem.dtype), shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy(values, "cuda", 0)


def product_graph(side: Side, problem: Problem, copies: int, rounds: int = 1) -> bytes:
    """A model that multiplies by each of so many weights, in turn, so many times over.

    Weights are inputs. Each round has an input of its own: of two equal products ONNX Runtime would
    compute one.
    """
    element = _ONNX_TYPES[problem.dtype]
    products = [(f"X{i}", f"W{j}", f"Y{i}.{j}") for i in range(rounds) for j in range(copies)]
    x_shape = [1, problem.tokens, problem.in_features]
    w_shape = [problem.in_features, problem.out_features]
    y_shape = [1, problem.tokens, problem.out_features]
    info = helper.make_tensor_value_info
    has_order = problem.grouped and side != "matmul"
    graph = helper.make_graph(
        [_product(side, names, has_order=has_order) for names in products],
        "bench",
        [
            *(info(f"X{i}", element, x_shape) for i in range(rounds)),
            *(info(f"W{j}", element, w_shape) for j in range(copies)),
        ],
        [info(y, element, y_shape) for _, _, y in products],
        [numpy_helper.from_array(_order(problem), _ORDER)] if has_order else [],
    )
    opsets = [
        helper.make_opsetid("", 20),
        helper.make_opsetid("nmexport", op_contract().opset_version),
    ]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _product(side: Side, names: tuple[str, str, str], *, has_order: bool) -> onnx.NodeProto:
    x, w, y = names
    if side == "matmul":
        return helper.make_node("MatMul", [x, w], [y])
    inputs = [x, w]
    if has_order:
        names_of = [entry.name for entry in op_contract().ops["NMLinear"].inputs]
        absent = names_of.index(_ORDER) - len(inputs)
        inputs += [""] * absent + [_ORDER]
    kept = _GROUP if side == "dense" else _KEEP
    return helper.make_node("NMLinear", inputs, [y], domain="nmexport", n=kept, m=_GROUP)


def _order(problem: Problem) -> NDArray[np.int32]:
    """A channel order without any order in it."""
    return np.random.default_rng(0).permutation(problem.in_features).astype(np.int32)
