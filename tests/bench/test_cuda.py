"""The CUDA benchmark as far as it goes without a GPU: tables, graphs, choices, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from nmexport.bench import cuda as cuda_bench
from nmexport.bench import cuda_graphs, cuda_plans
from nmexport.bench.cuda import bench_cuda
from nmexport.bench.cuda_graphs import product_graph
from nmexport.bench.cuda_plans import Device, Plan, PlanLibrary, Problem
from nmexport.cli.main import cli
from nmexport.errors import EnvironmentFault, RecipeError
from nmexport.runtimes import native
from nmexport.runtimes import onnxruntime_opening as onnxruntime

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROBLEM = Problem(in_features=64, out_features=32, tokens=1, dtype="float16")
GROUPED = Problem(in_features=64, out_features=32, tokens=1, dtype="float16", grouped=True)
PLAN = Plan(lanes=32, vectors=1, warps=8, unroll=8, resident=16, cluster=4)


def test_a_row_has_the_fields_of_the_table_in_order():
    row = cuda_plans.table_row(
        Device(90, 132), PROBLEM, PLAN, sparse_us=1.234, masked_us=5, dense_us=4
    )
    assert row == "90, 132, 2, 1, 64, 32, 0, 32, 1, 8, 8, 1, 16, 4, 0, 1.23, 5.00, 4.00"
    grouped = cuda_plans.table_row(
        Device(90, 132), GROUPED, PLAN, sparse_us=1.234, masked_us=5, dense_us=4
    )
    assert grouped == row.replace("32, 0, 32", "32, 1, 32")


@pytest.mark.parametrize(
    ("side", "kept"), [("matmul", None), ("dense", 16), ("sparse", 8), ("masked", 8)]
)
def test_graphs_hold_a_product_for_each_weight(side: Any, kept: int | None):
    model = onnx.load_from_string(product_graph(side, PROBLEM, 3))
    assert [node.op_type for node in model.graph.node] == [
        "MatMul" if kept is None else "NMLinear"
    ] * 3
    attributes = {a.name: a.i for a in model.graph.node[0].attribute}
    assert attributes == ({} if kept is None else {"n": kept, "m": 16})


@pytest.mark.skipif(native.find_library() is None, reason="no native library")
@pytest.mark.parametrize("problem", [PROBLEM, GROUPED], ids=str)
def test_a_graph_multiplies_by_every_weight_in_every_round(problem: Problem):
    problem = replace(problem, dtype="float32")
    graph = product_graph("sparse", problem, copies=2, rounds=3)
    session = onnxruntime.open_inference_session(
        graph, onnxruntime.session_options(library=native.find_library(), threads=1), "cpu"
    )
    random = np.random.default_rng(0)
    feeds = {
        value.name: random.standard_normal(value.shape, dtype=np.float32)
        for value in session.get_inputs()
    }
    assert sorted(feeds) == ["W0", "W1", "X0", "X1", "X2"]
    outputs = session.run(None, feeds)
    assert len(outputs) == 6
    order = cuda_graphs._order(problem) if problem.grouped else np.arange(64)
    x = feeds["X2"][0, 0, order].reshape(-1, 16)
    weakest = np.argsort(np.abs(x), axis=1)[:, :8]
    np.put_along_axis(x, weakest, 0, axis=1)
    wanted = x.reshape(-1) @ feeds["W1"]  # rows lie in the order, as x does now
    np.testing.assert_allclose(outputs[5][0, 0], wanted, rtol=1e-4, atol=1e-4)


def test_enough_copies_to_leave_the_cache():
    assert PROBLEM.copies(10 * 64 * 32 * 2) == 11
    assert PROBLEM.copies(1) == 3


@pytest.mark.parametrize(("copies", "launches"), [(1, 33), (100 * 64 * 32 * 2, 64)])
def test_a_replay_is_long_whatever_the_size(
    fake_gpu: Callable[[], list[FakeSession]], copies: int, launches: int
):
    outcome = bench_cuda([(64, 32)], [1], rounds=1, rotated_bytes=copies)
    assert {row["launches"] for row in outcome["results"]} == {launches}


@pytest.mark.parametrize(
    ("shape", "tokens", "message"),
    [((60, 32), 1, "60x32"), ((64, 0), 1, "64x0"), ((64, 32), 5, "5 tokens"), ((64, 32), 0, "0")],
)
def test_what_the_kernel_does_not_take_is_refused(
    shape: tuple[int, int], tokens: int, message: str
):
    with pytest.raises(RecipeError, match=message):
        bench_cuda([shape], [tokens])


@pytest.mark.skipif(native.find_library() is None, reason="no native library")
def test_without_kernels_or_gpu_it_says_so():
    with pytest.raises(EnvironmentFault, match=r"no CUDA kernels|no CUDA GPU"):
        PlanLibrary(native.require_library())


def test_without_the_provider_it_says_so():
    with pytest.raises(EnvironmentFault, match="no CUDA provider"):
        onnxruntime.open_cuda_graph(b"", onnxruntime.session_options(library=None, threads=1))


class FakeLibrary:
    """Plans of a GPU that is not there; remembers the tables it was given."""

    device = Device(90, 132)

    def __init__(self, _: Path) -> None:
        self.tables: list[str] = []

    def plans(self, _: int) -> list[Plan]:
        return [PLAN, Plan(16, 1, 8, 8, 24, 2)]

    def use(self, rows: list[str]) -> None:
        self.tables += rows


class FakeSession:
    """Counts runs; the slower, the later in `us`."""

    def __init__(self) -> None:
        self.runs = 0

    def io_binding(self) -> FakeSession:
        return self

    def bind_ortvalue_input(self, *_: object) -> None: ...

    def bind_ortvalue_output(self, *_: object) -> None: ...

    def get_outputs(self) -> list[Any]:
        return []

    def run_with_iobinding(self, _: object) -> None:
        self.runs += 1


@pytest.fixture
def fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[FakeSession]]:
    """No GPU, but all that the benchmark does around it."""
    sessions: list[FakeSession] = []

    def opened(*_: object) -> FakeSession:
        sessions.append(FakeSession())
        return sessions[-1]

    monkeypatch.setattr(cuda_bench, "PlanLibrary", FakeLibrary)
    monkeypatch.setattr(cuda_bench._Bench, "_device_value", lambda *_: None)
    monkeypatch.setattr("nmexport.runtimes.onnxruntime_opening.open_cuda_graph", opened)
    import onnxruntime as runtime

    class Options:
        log_severity_level = 0

        def register_custom_ops_library(self, _: str) -> None: ...

    monkeypatch.setattr(runtime, "SessionOptions", Options)
    monkeypatch.setattr(native, "require_library", lambda: tmp_path / "library.so")
    return lambda: sessions


def test_every_plan_is_tried_and_every_side_timed(fake_gpu: Callable[[], list[FakeSession]]):
    notes: list[str] = []
    outcome = bench_cuda([(64, 32)], [1, 2], rounds=4, rotated_bytes=1, note=notes.append)
    # With and without an order: two plans for one token, then four sides each.
    assert len(fake_gpu()) == 2 * (2 + 4 + 4)
    assert [session.runs for session in fake_gpu()] == 2 * ([6] * 2 + [7] * 4) + [7] * 8
    assert [row["tokens"] for row in outcome["results"]] == [1, 1, 2, 2]
    assert [line.split(", ")[:7] for line in outcome["table"]] == [
        ["90", "132", "2", str(tokens), "64", "32", str(grouped)]
        for tokens in (1, 2)
        for grouped in (0, 1)
    ]
    assert all(set(row["us"]) == set(cuda_bench.SIDES) for row in outcome["results"])
    assert notes == [
        f"64x32, {tokens} tokens{order}" for tokens in (1, 2) for order in ("", ", channel order")
    ]


SAVE = ("bench", "cuda", "--shape", "64x32", "--tokens", "1", "--rounds", "1", "--save")


def test_the_command_writes_the_table(fake_gpu: Callable[[], list[FakeSession]], tmp_path: Path):
    table = tmp_path / "plans.csv"
    done = CliRunner().invoke(cli, [*SAVE, "--table", str(table)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / native.CUDA_PLANS_FILE).read_text() == table.read_text()
    rows = table.read_text().splitlines()
    assert [row[:26] for row in rows] == [f"90, 132, 2, 1, 64, 32, {i}, " for i in (0, 1)]
    assert len(fake_gpu()) == 2 * 6


def test_what_was_saved_before_stays(fake_gpu: Callable[[], list[FakeSession]], tmp_path: Path):
    saved = tmp_path / native.CUDA_PLANS_FILE
    rest = "1, 8, 8, 1, 16, 4, 0, 1.23, 5.00, 4.00"
    other, same = (f"90, 132, {size}, 1, 64, 32, 0, 32, {rest}" for size in (4, 2))
    saved.write_text(f"// by hand\n{other}\n\n{same}\n")
    for _ in range(2):
        done = CliRunner().invoke(cli, SAVE)
        assert done.exit_code == 0, done.output
    lines = saved.read_text().splitlines()
    assert lines[:3] == ["// by hand", other, ""]
    assert len(lines) == 5
    assert same not in lines


def test_a_table_that_is_none_is_not_written_over(
    fake_gpu: Callable[[], list[FakeSession]], tmp_path: Path
):
    saved = tmp_path / native.CUDA_PLANS_FILE
    saved.write_text("// fine\nnonsense\n")
    done = CliRunner().invoke(cli, SAVE)
    assert done.exit_code == 1
    assert "Line 2 is no row" in done.output
    assert saved.read_text() == "// fine\nnonsense\n"


def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    fake_gpu: Callable[[], list[FakeSession]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda_plans.os, "access", lambda *_: False)
    done = CliRunner().invoke(cli, SAVE)
    assert done.exit_code == 1
    assert "cannot be saved in" in done.output
    assert "virtual environment" in done.output
    assert fake_gpu() == []


def test_a_disk_that_fills_up_meanwhile_is_told(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="cannot be saved"):
        cuda_plans.save_plans(tmp_path / "gone" / "library.so", [])


class FakeNative:
    """The library's entry for plans; takes a table of one line."""

    def __init__(self) -> None:
        self.given: list[bytes] = []
        self.nmexport_use_cuda_plans = self._use

    def _use(self, text: bytes) -> int:
        self.given.append(text)
        return 0 if text.count(b"\n") == 1 else 2


class _Entry:
    """A ctypes function: callable, and takes attributes."""

    def __init__(self, call: Callable[[bytes], int]) -> None:
        self.call = call
        self.argtypes: list[type] = []

    def __call__(self, text: bytes) -> int:
        return self.call(text)


def test_plans_beside_the_library_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeNative()
    fake.nmexport_use_cuda_plans = _Entry(fake._use)  # type: ignore[assignment]
    monkeypatch.setattr(native, "_load", lambda _: fake)
    library = tmp_path / "library.so"
    assert not native.use_cuda_plans(library)
    plans = tmp_path / native.CUDA_PLANS_FILE
    plans.write_text("a row\n")
    assert native.use_cuda_plans(library)
    assert fake.given == [b"a row\n"]
    plans.write_text("a row\nnonsense\n")
    with pytest.raises(EnvironmentFault, match="Line 2 of"):
        native.use_cuda_plans(library)
