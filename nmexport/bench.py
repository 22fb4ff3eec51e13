"""Speed of the native NMLinear beside ONNX Runtime's MatMul and beside our own dense product.

One graph a side, each holding as many different weights as exceed the last-level cache, so that
weights come from memory as they do in a model; the sides take turns within one run. All outputs
share one buffer, as activations do in a model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import RecipeError
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

Dtype = Literal["float32", "float16"]
Side = Literal["matmul", "own_dense", "sparse"]

SIDES: tuple[Side, ...] = ("matmul", "own_dense", "sparse")
SMOLLM2_SHAPES: tuple[tuple[int, int], ...] = ((576, 576), (576, 192), (576, 1536), (1536, 576))
"""(in_features, out_features) of SmolLM2-135M's linears."""
DEFAULT_PATTERN = NMPattern(8, 16)
ROTATED_BYTES = 96 << 20
"""Weights of one side together; three times a last-level cache of 32 MiB."""
_MAX_COPIES = 256
_MIN_COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Durations of one node, in microseconds."""

    p10_us: float
    median_us: float
    p90_us: float

    @classmethod
    def of(cls, durations_us: Sequence[float]) -> Timing:
        """Quantiles of the runs."""
        import numpy as np

        low, middle, high = np.percentile(np.asarray(durations_us), [10, 50, 90])
        return cls(p10_us=float(low), median_us=float(middle), p90_us=float(high))


def bench_kernels(
    shapes: Sequence[tuple[int, int]] = SMOLLM2_SHAPES,
    tokens: Sequence[int] = (1, 128),
    *,
    threads: int = 1,
    pattern: NMPattern = DEFAULT_PATTERN,
    dtype: Dtype = "float32",
    grouped: bool = False,
    seconds: float = 2.0,
    min_runs: int = 5,
    rotated_bytes: int = ROTATED_BYTES,
    library: Path | None = None,
) -> dict[str, Any]:
    """Time the three sides on every shape and token count.

    Args:
        shapes: (in_features, out_features) pairs; in_features a multiple of the group size.
        tokens: Tokens of a run: 1 is decode, many are prefill.
        threads: Intra-op threads of each session.
        pattern: N:M of the sparse side.
        dtype: Of activations and weights.
        grouped: Give the sparse side a `channel_order`.
        seconds: Least time for each shape and token count.
        min_runs: Least runs of each side.
        rotated_bytes: Weights of one side together; above the last-level cache they are cold.
        library: The native library; default the installed one.

    Returns:
        JSON values: the settings, and `results`, one row a shape and token count, with p10, median
        and p90 of each side in microseconds, `ratio` (MatMul over sparse, medians),
        `ratio_own_dense`, and `kept_gb_per_s`, the rate at which kept weights are read.

    Raises:
        RecipeError: if a shape does not fit the pattern or a number is out of range.
        EnvironmentFault: if the native library is missing.
    """
    import onnxruntime
    from nmexport.runtimes import native

    _check(shapes, tokens, threads, pattern)
    path = library or native.require_library()
    rows = [
        _bench_one(
            _Problem(
                in_features=in_features,
                out_features=out_features,
                tokens=count,
                pattern=pattern,
                dtype=dtype,
                grouped=grouped,
                rotated_bytes=rotated_bytes,
            ),
            library=path,
            threads=threads,
            seconds=seconds,
            min_runs=min_runs,
        )
        for in_features, out_features in shapes
        for count in tokens
    ]
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "variant": native.describe_library(path)["variant"],
        "threads": threads,
        "pattern": str(pattern),
        "dtype": dtype,
        "grouped": grouped,
        "results": rows,
    }


def interleave(
    sides: dict[Side, Callable[[], None]], *, seconds: float, min_runs: int
) -> dict[Side, list[float]]:
    """Run the sides in turn until both limits are met; durations in microseconds.

    Every side runs once beforehand, unmeasured.
    """
    durations: dict[Side, list[float]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    end = time.perf_counter() + seconds
    runs = 0
    while runs < min_runs or time.perf_counter() < end:
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            durations[side].append((time.perf_counter() - start) * 1e6)
        runs += 1
    return durations


@dataclass(frozen=True, kw_only=True)
class _Problem:
    in_features: int
    out_features: int
    tokens: int
    pattern: NMPattern
    dtype: Dtype
    grouped: bool
    rotated_bytes: int

    @property
    def weight_bytes(self) -> int:
        return self.in_features * self.out_features * (4 if self.dtype == "float32" else 2)

    @property
    def copies(self) -> int:
        wanted = self.rotated_bytes // self.weight_bytes + 1
        return min(max(wanted, _MIN_COPIES), _MAX_COPIES)


def _check(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], threads: int, pattern: NMPattern
) -> None:
    for in_features, out_features in shapes:
        if in_features < 1 or out_features < 1 or in_features % pattern.m:
            raise RecipeError(
                f"Shape {in_features}x{out_features} does not fit {pattern}.",
                allowed=f"in_features a multiple of {pattern.m}, both positive",
            )
    if threads < 1 or any(count < 1 for count in tokens):
        raise RecipeError(
            f"threads {threads} and tokens {list(tokens)} cannot be measured.",
            allowed="1 or more of each",
        )


def _bench_one(
    problem: _Problem, *, library: Path, threads: int, seconds: float, min_runs: int
) -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    weights = [
        random.standard_normal((problem.in_features, problem.out_features), dtype=np.float32)
        / np.sqrt(problem.in_features, dtype=np.float32)
        for _ in range(problem.copies)
    ]
    typed = [weight.astype(problem.dtype) for weight in weights]
    shape = (1, problem.tokens, problem.in_features)
    x = random.standard_normal(shape, dtype=np.float32).astype(problem.dtype)
    runs = {
        side: _runner(_graph(side, problem, typed), x, problem, library, threads) for side in SIDES
    }
    durations = interleave(runs, seconds=seconds, min_runs=min_runs)
    timings = {side: Timing.of([one / problem.copies for one in durations[side]]) for side in SIDES}
    sparse_us = timings["sparse"].median_us
    kept_bytes = problem.weight_bytes * problem.pattern.density
    return {
        "in_features": problem.in_features,
        "out_features": problem.out_features,
        "tokens": problem.tokens,
        "weights": problem.copies,
        "runs": len(durations["sparse"]),
        **{side: vars(timing) for side, timing in timings.items()},
        "ratio": timings["matmul"].median_us / sparse_us,
        "ratio_own_dense": timings["own_dense"].median_us / sparse_us,
        "kept_gb_per_s": kept_bytes / sparse_us / 1e3,
    }


def _graph(side: Side, problem: _Problem, weights: list[NDArray[Any]]) -> bytes:
    """A model with one product for each weight, all of the same input."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    element = helper.np_dtype_to_tensor_dtype(np.dtype(problem.dtype))
    initializers = [numpy_helper.from_array(w, f"W{i}") for i, w in enumerate(weights)]
    ordered = side == "sparse" and problem.grouped
    if ordered:
        order = np.random.default_rng(1).permutation(problem.in_features).astype(np.int32)
        initializers.append(numpy_helper.from_array(order, "order"))
    absent = [""] * 4  # bias, shift, shift_weight, score_scale
    kept = problem.pattern.n if side == "sparse" else problem.pattern.m
    nodes = [
        helper.make_node("MatMul", ["X", f"W{i}"], [f"Y{i}"])
        if side == "matmul"
        else helper.make_node(
            "NMLinear",
            ["X", f"W{i}", *([*absent, "order"] if ordered else [])],
            [f"Y{i}"],
            domain="nmexport",
            n=kept,
            m=problem.pattern.m,
        )
        for i in range(len(weights))
    ]
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("X", element, [1, problem.tokens, problem.in_features])],
        [
            helper.make_tensor_value_info(
                f"Y{i}", element, [1, problem.tokens, problem.out_features]
            )
            for i in range(len(weights))
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nmexport", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _runner(
    model: bytes, x: NDArray[Any], problem: _Problem, library: Path, threads: int
) -> Callable[[], None]:
    """A call that runs the whole model once, without allocating."""
    import numpy as np

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y: np.ndarray[Any, Any] = np.zeros(
        (1, problem.tokens, problem.out_features), dtype=problem.dtype
    )
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu", 0, y.dtype, y.shape, y.ctypes.data)

    def run(_alive: tuple[NDArray[Any], NDArray[Any]] = (x, y)) -> None:
        # The binding holds addresses only: the arrays live as long as this function.
        session.run_with_iobinding(binding)

    return run
