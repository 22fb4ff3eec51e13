"""Speed of the native NMLinear on a CPU next to every dense product that it has to beat.

One graph a side, each holding as many different weights as exceed the last-level cache, so that
weights come from memory as they do in a model; the sides take turns within one run, and who begins
moves on. All outputs share one buffer, as activations do in a model.

| side | what it is |
|---|---|
| `matmul` | ONNX Runtime's MatMul in float32, its weights prepacked |
| `nbits8`, `nbits4` | ONNX Runtime's MatMulNBits: dense weights in int8 and int4 |
| `dense_T` | our own kernel over all rows, weights in T |
| `sparse_T` | our kernel over the kept rows, weights in T |
| `select` | NMPrune alone, in float32: the selection of `sparse_T`, and a write |
| `read` | the same memory read in order and nothing else: the ceiling |
"""

from __future__ import annotations

import functools
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

import onnxruntime
from nmexport.bench.kernel_graphs import (
    ITEM_BYTES,
    NBITS,
    Dtype,
    Problem,
    product_model,
    side_names,
)
from nmexport.environment import probe
from nmexport.errors import RecipeError
from nmexport.runtimes import native
from nmexport.runtimes.native import HUGE_PAGES_ENTRY
from nmexport.runtimes.onnxruntime_opening import SESSION_CONFIG, session_options
from nmexport.sparsity.pattern import NMPattern
from nmexport.timing import interleave, milliseconds, percentiles, rounds_lasting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

SMOLLM2_SHAPES: tuple[tuple[int, int], ...] = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""(in_features, out_features) of SmolLM2-135M's linears, fused as they are exported."""
LLM_SHAPES: tuple[tuple[int, int], ...] = (
    (4096, 6144),
    (4096, 4096),
    (4096, 28672),
    (14336, 4096),
    (2048, 8192),
    (576, 1536),
)
"""Linears of 1B to 8B models, and one of SmolLM2's."""
DEFAULT_PATTERN = NMPattern(8, 16)
CACHE_BYTES = 32 << 20
"""A last-level cache, where the system does not tell its size."""
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_TIMES_CACHE = 3  # weights of one side together, of the last-level cache
_SELECT_NODES = 64  # selections of one run, so that the run's own cost does not count as theirs


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Durations of one node, in microseconds."""

    p10_us: float
    median_us: float
    p90_us: float

    @classmethod
    def of(cls, durations_us: Sequence[float]) -> Timing:
        """Compute the quantiles of the runs."""
        p10, p50, p90 = percentiles(durations_us, (10, 50, 90))
        return cls(p10_us=p10, median_us=p50, p90_us=p90)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The sparse side of one weight type held against the others, by medians."""

    ratio: float
    """The faster dense side of the same weights over sparse; MatMul counts as float32 and
    MatMulNBits as int8."""
    ratio_own_dense: float
    ratio_matmul_float32: float
    kept_gb_per_s: float
    """The rate at which kept weights are read."""
    share_of_read: float
    """That rate over what a loop reads."""
    selection_share: float
    """Selection's part of the sparse side's time."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape, thread and token count, measured."""

    in_features: int
    out_features: int
    tokens: int
    threads: int
    weights: int
    """Different weights that a sparse side goes through."""
    runs: int
    sides: Mapping[str, Timing]
    read_gb_per_s: float
    figures: Mapping[Dtype, Figures]

    def as_json(self) -> dict[str, object]:
        """JSON values; the figures lie next to the rest, by the weights' type."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "tokens": self.tokens,
            "threads": self.threads,
            "weights": self.weights,
            "runs": self.runs,
            "sides": {side: vars(timing) for side, timing in self.sides.items()},
            "read_gb_per_s": self.read_gb_per_s,
            **{dtype: vars(figures) for dtype, figures in self.figures.items()},
        }


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """The measurements of `bench_kernels`, with their settings."""

    runtime: str
    variant: str
    """The kernels that the native library chose, such as avx512."""
    device: str
    pattern: NMPattern
    dtypes: tuple[Dtype, ...]
    grouped: bool
    rotated_bytes: int
    results: tuple[Row, ...]

    def as_json(self) -> dict[str, object]:
        """JSON values."""
        return {
            **vars(self),
            "pattern": str(self.pattern),
            "dtypes": list(self.dtypes),
            "results": [row.as_json() for row in self.results],
        }


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Settings of the sides, and how long each row is measured."""

    threads: Sequence[int] = (1,)
    """Intra-op threads of each session; a row for each."""
    pattern: NMPattern = DEFAULT_PATTERN
    dtypes: Sequence[Dtype] = ("float32",)
    """Types of the weights."""
    grouped: bool = False
    """Give the sparse sides a `channel_order`."""
    rivals: bool = True
    """Time MatMulNBits too."""
    seconds: float = 2.0
    """Least time for each row."""
    min_runs: int = 5
    """Least runs of each side."""
    rotated_bytes: int | None = None
    """Weights of one side together; above the last-level cache they are cold. None is three times
    that cache."""
    library: Path | None = None
    """The native library; None is the installed one."""


DEFAULT_SETTINGS = KernelSettings()


def bench_kernels(
    shapes: Sequence[tuple[int, int]] = SMOLLM2_SHAPES,
    tokens: Sequence[int] = (1, 128),
    settings: KernelSettings = DEFAULT_SETTINGS,
) -> KernelTimes:
    """Time all sides on every shape, token count and thread count.

    Args:
        shapes: (in_features, out_features) pairs; in_features a multiple of the group size.
        tokens: Tokens of a run: 1 is decode, many are prefill.
        settings: The sides, and how long each row is measured.

    Returns:
        The settings, and a row for each shape, thread and token count.

    Raises:
        RecipeError: if a shape does not fit the pattern or a number is out of range.
        EnvironmentFault: if the native library is missing.
    """
    _check(shapes, tokens, settings)
    path = settings.library or native.require_library()
    rotated = settings.rotated_bytes
    if rotated is None:
        rotated = _TIMES_CACHE * last_level_cache()
    rows: list[Row] = []
    for in_features, out_features in shapes:
        for count in settings.threads:
            problem = Problem(
                in_features=in_features,
                out_features=out_features,
                threads=count,
                pattern=settings.pattern,
                dtypes=tuple(settings.dtypes),
                grouped=settings.grouped,
                rivals=settings.rivals,
                rotated_bytes=rotated,
                library=path,
            )
            with _Sides(problem) as sides:
                rows += [
                    sides.row(count, seconds=settings.seconds, min_runs=settings.min_runs)
                    for count in tokens
                ]
    return KernelTimes(
        runtime=f"onnxruntime {onnxruntime.__version__}",
        variant=native.describe_library(path)["variant"],
        device=probe().cpu,
        pattern=settings.pattern,
        dtypes=tuple(settings.dtypes),
        grouped=settings.grouped,
        rotated_bytes=rotated,
        results=tuple(rows),
    )


def last_level_cache(folder: Path = _CACHES) -> int:
    """Return the size of the largest cache; `CACHE_BYTES` where the system does not say."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        for path in folder.glob("index*/size")
    ]
    return max((int(size[1]) * units[size[2]] for size in sizes if size), default=CACHE_BYTES)


def _check(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], settings: KernelSettings
) -> None:
    pattern, threads = settings.pattern, settings.threads
    for in_features, out_features in shapes:
        if in_features < 1 or out_features < 1 or in_features % pattern.m:
            raise RecipeError(
                f"Shape {in_features}x{out_features} does not fit {pattern}.",
                allowed=f"in_features a multiple of {pattern.m}, both positive",
            )
    if any(count < 1 for count in (*threads, *tokens)):
        raise RecipeError(
            f"threads {list(threads)} and tokens {list(tokens)} cannot be measured.",
            allowed="1 or more of each",
        )


class _Sides:
    """All sides of one shape and thread count, opened once for all token counts; close them."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._copies: dict[str, int] = {}
        self._sessions = {name: _open(self._graph(name), problem) for name in side_names(problem)}
        # One piece for each thread: the loop is to be timed, not what starts it.
        size = problem.copies(4) * int(problem.weight_bytes("float32")) // problem.threads
        self._memory = [np.ones(size, np.uint8) for _ in range(problem.threads)]
        self._readers = ThreadPoolExecutor(problem.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown()
        self._sessions.clear()  # gigabytes, which the next shape needs
        self._memory.clear()

    def _graph(self, name: str) -> onnx.ModelProto:
        problem = self._problem
        item = NBITS[name] / 8 if name in NBITS else ITEM_BYTES.get(name.partition("_")[2], 4)
        self._copies[name] = _SELECT_NODES if name == "select" else problem.copies(item)
        return product_model(name, problem, self._copies[name])

    def row(self, tokens: int, *, seconds: float, min_runs: int) -> Row:
        """Measure one token count."""
        problem = self._problem
        runs: dict[str, Callable[[], None]] = {
            name: _runner(session, tokens, problem) for name, session in self._sessions.items()
        }
        timed = {
            name: functools.partial(milliseconds, run)
            for name, run in {**runs, "read": self._read}.items()
        }
        durations = interleave(timed, rounds_lasting(seconds, at_least=min_runs))
        timings = {
            name: Timing.of([1e3 * ms / self._copies.get(name, 1) for ms in values])
            for name, values in durations.items()
        }
        read = sum(part.nbytes for part in self._memory) / timings["read"].median_us / 1e3
        medians = {name: timing.median_us for name, timing in timings.items()}
        return Row(
            in_features=problem.in_features,
            out_features=problem.out_features,
            tokens=tokens,
            threads=problem.threads,
            weights=self._copies[f"sparse_{problem.dtypes[0]}"],
            runs=len(durations["read"]),
            sides=timings,
            read_gb_per_s=read,
            figures={dtype: _figures(dtype, problem, medians, read) for dtype in problem.dtypes},
        )

    def _read(self) -> None:
        def share(part: NDArray[Any]) -> None:
            native.read_memory(self._problem.library, part.ctypes.data, part.nbytes)

        list(self._readers.map(share, self._memory))


def _figures(dtype: Dtype, problem: Problem, medians: Mapping[str, float], read: float) -> Figures:
    sparse, own = medians[f"sparse_{dtype}"], medians[f"dense_{dtype}"]
    rival = {"float32": "matmul", "int8": "nbits8", "int8:128": "nbits8"}.get(dtype)
    dense = min(own, medians.get(rival, own)) if rival else own
    kept = problem.weight_bytes(dtype) * problem.pattern.density / sparse / 1e3
    return Figures(
        ratio=dense / sparse,
        ratio_own_dense=own / sparse,
        ratio_matmul_float32=medians["matmul"] / sparse,
        kept_gb_per_s=kept,
        share_of_read=kept / read,
        selection_share=medians["select"] / sparse,
    )


@dataclass(frozen=True)
class _Session:
    session: Any
    element: int
    columns: int


def _open(model: onnx.ModelProto, problem: Problem) -> _Session:

    config = {**SESSION_CONFIG, HUGE_PAGES_ENTRY: "1"}  # as whole models open where they fit
    options = session_options(library=problem.library, threads=problem.threads, config=config)
    with tempfile.TemporaryDirectory() as folder:
        # Weights outside the model: together they may exceed what protobuf holds.
        path = Path(folder) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output = model.graph.output[0].type.tensor_type
    return _Session(session, output.elem_type, output.shape.dim[2].dim_value)


def _runner(opened: _Session, tokens: int, problem: Problem) -> Callable[[], None]:
    """Make a call that runs the whole model once, without allocating."""
    dtype = helper.tensor_dtype_to_np_dtype(opened.element)
    random = np.random.default_rng(2)
    x = random.standard_normal((1, tokens, problem.in_features), dtype=np.float32)
    x = x.astype(ml_dtypes.bfloat16 if dtype.itemsize == 2 and dtype.kind != "f" else dtype)  # noqa: PLR2004
    y = np.zeros((1, tokens, opened.columns), dtype=x.dtype)
    binding = opened.session.io_binding()
    binding.bind_input("X", "cpu", 0, opened.element, x.shape, x.ctypes.data)
    for output in opened.session.get_outputs():
        binding.bind_output(output.name, "cpu", 0, opened.element, y.shape, y.ctypes.data)

    def run(_alive: tuple[NDArray[Any], NDArray[Any]] = (x, y)) -> None:
        # The binding holds addresses only: the arrays live as long as this function.
        opened.session.run_with_iobinding(binding)

    return run
