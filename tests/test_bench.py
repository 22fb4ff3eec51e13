"""The kernel benchmark: what it returns, that sides take turns, that bad settings are refused."""

from __future__ import annotations

import json

import pytest
from nmexport.bench import Timing, bench_kernels, interleave
from nmexport.errors import RecipeError
from nmexport.runtimes import native
from nmexport.sparsity.pattern import NMPattern

needs_library = pytest.mark.skipif(
    native.find_library() is None, reason=f"no native library: {native.why_missing()}"
)


def test_sides_take_turns_after_one_unmeasured_run_each():
    calls: list[str] = []
    durations = interleave(
        {"matmul": lambda: calls.append("a"), "sparse": lambda: calls.append("b")},
        seconds=0.0,
        min_runs=3,
    )
    assert "".join(calls) == "ab" * 4
    assert [len(values) for values in durations.values()] == [3, 3]


def test_timing_is_quantiles():
    timing = Timing.of([float(value) for value in range(101)])
    assert (timing.p10_us, timing.median_us, timing.p90_us) == (10.0, 50.0, 90.0)


@needs_library
@pytest.mark.parametrize("grouped", [False, True])
def test_result_is_json_with_a_row_for_each_shape_and_token_count(grouped: bool):
    outcome = bench_kernels(
        [(32, 48), (64, 16)],
        [1, 3],
        pattern=NMPattern(2, 4),
        grouped=grouped,
        seconds=0.0,
        min_runs=3,
        rotated_bytes=1,
    )
    assert json.loads(json.dumps(outcome)) == outcome
    rows = outcome["results"]
    assert [(r["in_features"], r["out_features"], r["tokens"]) for r in rows] == [
        (32, 48, 1),
        (32, 48, 3),
        (64, 16, 1),
        (64, 16, 3),
    ]
    for row in rows:
        assert row["runs"] == 3
        assert row["ratio"] == pytest.approx(
            row["matmul"]["median_us"] / row["sparse"]["median_us"]
        )
        assert row["kept_gb_per_s"] > 0


@needs_library
def test_rotation_holds_more_weights_than_asked_bytes():
    outcome = bench_kernels(
        [(16, 16)], [1], dtype="float16", seconds=0.0, min_runs=1, rotated_bytes=5 * 512
    )
    assert outcome["results"][0]["weights"] == 6


def test_a_shape_that_does_not_fit_the_pattern_is_refused():
    with pytest.raises(RecipeError, match="multiple of 16"):
        bench_kernels([(24, 8)])


def test_no_tokens_are_refused():
    with pytest.raises(RecipeError, match="1 or more"):
        bench_kernels([(16, 8)], [0])
