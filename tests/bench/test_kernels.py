"""The kernel benchmark: what it returns, that sides take turns, that bad settings are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nmexport.bench.kernels import (
    CACHE_BYTES,
    KernelSettings,
    Timing,
    bench_kernels,
    last_level_cache,
)
from nmexport.errors import RecipeError
from nmexport.runtimes import native
from nmexport.sparsity.pattern import NMPattern
from nmexport.timing import interleave, rounds_lasting

needs_library = pytest.mark.skipif(
    native.find_library() is None, reason=f"no native library: {native.why_missing()}"
)


def test_sides_take_turns_and_who_begins_moves_on():
    calls: list[str] = []
    durations = interleave(
        {"matmul": lambda: calls.append("a"), "sparse": lambda: calls.append("b")},
        rounds_lasting(0.0, at_least=3),
    )
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(values) for values in durations.values()] == [3, 3]


def test_timing_is_quantiles():
    timing = Timing.of([float(value) for value in range(101)])
    assert (timing.p10_us, timing.median_us, timing.p90_us) == (10.0, 50.0, 90.0)


@needs_library
@pytest.mark.parametrize("grouped", [False, True])
def test_result_is_json_with_a_row_for_each_shape_thread_and_token_count(grouped: bool):
    outcome = bench_kernels(
        [(32, 48), (64, 16)],
        [1, 3],
        KernelSettings(
            threads=[1, 2],
            pattern=NMPattern(2, 4),
            dtypes=("float32", "bfloat16", "int8", "int8:128"),
            grouped=grouped,
            seconds=0.0,
            min_runs=3,
            rotated_bytes=1,
        ),
    )
    document = outcome.as_json()
    assert json.loads(json.dumps(document)) == document
    rows = outcome.results
    assert [(r.in_features, r.out_features, r.threads, r.tokens) for r in rows] == [
        (k, o, threads, tokens)
        for k, o in ((32, 48), (64, 16))
        for threads in (1, 2)
        for tokens in (1, 3)
    ]
    ours = {f"{kind}_{dtype}" for kind in ("dense", "sparse") for dtype in outcome.dtypes}
    for row, written in zip(rows, document["results"], strict=True):
        assert row.runs == 3
        assert set(row.sides) == {*ours, "matmul", "nbits8", "nbits4", "select", "read"}
        medians = {side: timing.median_us for side, timing in row.sides.items()}
        assert {side: timing["median_us"] for side, timing in written["sides"].items()} == medians
        dense = min(medians["matmul"], medians["dense_float32"])
        assert row.figures["float32"].ratio == pytest.approx(dense / medians["sparse_float32"])
        assert written["float32"]["ratio"] == row.figures["float32"].ratio
        for dtype in ("int8", "int8:128"):
            dense = min(medians["nbits8"], medians[f"dense_{dtype}"])
            ratio = dense / medians[f"sparse_{dtype}"]
            assert row.figures[dtype].ratio == pytest.approx(ratio)
        for dtype in outcome.dtypes:
            share = medians["select"] / medians[f"sparse_{dtype}"]
            assert row.figures[dtype].selection_share == pytest.approx(share)
        kept = row.in_features * row.out_features / 2 / medians["sparse_int8"] / 1e3
        assert row.figures["int8"].kept_gb_per_s == pytest.approx(kept)
        assert row.read_gb_per_s > 0


@needs_library
def test_rotation_holds_more_weights_than_asked_bytes():
    outcome = bench_kernels(
        [(16, 16)],
        [1],
        KernelSettings(dtypes=["float16"], seconds=0.0, min_runs=1, rotated_bytes=5 * 512),
    )
    row = outcome.results[0]
    assert row.weights == 6
    assert "nbits4" not in row.sides, "16 channels hold no group of 32"


def test_weights_pass_through_more_than_the_cache_that_the_system_tells_of(tmp_path):
    for index, size in (("index0", "48K"), ("index3", "32M\n"), ("index2", "unknown")):
        (tmp_path / index).mkdir()
        (tmp_path / index / "size").write_text(size)
    assert last_level_cache(tmp_path) == 32 << 20
    assert last_level_cache(tmp_path / "none") == CACHE_BYTES
    outcome = bench_kernels([])
    assert outcome.rotated_bytes == 3 * last_level_cache()


@needs_library
def test_a_shape_is_let_go_before_the_next_is_opened(monkeypatch):
    from nmexport.bench import kernels as bench

    alive: list[int] = []
    opened = bench._Sides.__init__
    left = bench._Sides.__exit__

    def enter(self, problem):
        opened(self, problem)
        alive.append(len(self._sessions))

    def leave(self, *args):
        left(self, *args)
        assert not self._sessions
        assert self._readers._shutdown
        alive.pop()
        assert not alive

    monkeypatch.setattr(bench._Sides, "__init__", enter)
    monkeypatch.setattr(bench._Sides, "__exit__", leave)
    bench_kernels(
        [(16, 16), (32, 16)], [1], KernelSettings(seconds=0.0, min_runs=1, rotated_bytes=1)
    )


@needs_library
def test_reading_reads_everything():
    words = np.arange(1, 1025, dtype=np.uint64)
    found = native.read_memory(native.require_library(), words.ctypes.data, words.nbytes)
    assert found == np.bitwise_xor.reduce(words)


def test_a_shape_that_does_not_fit_the_pattern_is_refused():
    with pytest.raises(RecipeError, match="multiple of 16"):
        bench_kernels([(24, 8)])


def test_no_tokens_are_refused():
    with pytest.raises(RecipeError, match="1 or more"):
        bench_kernels([(16, 8)], [0])
    with pytest.raises(RecipeError, match="1 or more"):
        bench_kernels([(16, 8)], [1], KernelSettings(threads=[0]))
