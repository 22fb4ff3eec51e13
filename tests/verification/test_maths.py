"""Formulas of the verification against slow, obvious arithmetic."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from nmexport.progress import Silent
from nmexport.report.model import ParityLeg
from nmexport.timing import interleave, percentiles, rounds_lasting
from nmexport.verification.accuracy import compare
from nmexport.verification.continuation import compare as compare_continuations
from nmexport.verification.continuation import first_divergence
from nmexport.verification.divergence import DivergenceSum, token_kl
from nmexport.verification.latency import speedup_interval, summary
from nmexport.verification.parity import compare as compare_executors
from nmexport.verification.perplexity import NllSum, log_softmax, ratio_stderr, token_nll


class Fixed:
    """A session whose next token depends on the last one alone, by a table of logits `[V, V]`."""

    exposes_cache = False
    decodes_second_half = False

    def __init__(self, table: np.ndarray) -> None:
        self.table = np.asarray(table, dtype=np.float32)
        self.vocabulary_size = len(table)
        self.calls: list[str] = []

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        self.calls.append("prefill")
        return self.table[input_ids]

    def decode_step(self, input_ids: np.ndarray) -> np.ndarray:
        self.calls.append("decode")
        return self.table[input_ids]


def _table(seed: int, size: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32) * 3


def _brute_probabilities(row: np.ndarray) -> list[float]:
    weights = [math.exp(float(x) - float(max(row))) for x in row]
    return [weight / math.fsum(weights) for weight in weights]


def test_accuracy_against_brute_force() -> None:
    dense, sparse = _table(0), _table(1)
    rng = np.random.default_rng(2)
    windows = [rng.integers(7, size=length) for length in (5, 200, 66)]
    report = compare(Fixed(dense), Fixed(sparse), windows)

    nll_dense, nll_sparse, kl, same = [], [], [], []
    for window in windows:
        for now, after in pairwise(window):
            p, q = _brute_probabilities(dense[now]), _brute_probabilities(sparse[now])
            nll_dense.append(-math.log(p[after]))
            nll_sparse.append(-math.log(q[after]))
            kl.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(max(range(7), key=p.__getitem__) == max(range(7), key=q.__getitem__))
    mean = np.mean
    assert report.tokens == 4 + 199 + 65
    assert report.dense.perplexity == pytest.approx(math.exp(mean(nll_dense)), rel=1e-12)
    assert report.sparse.perplexity == pytest.approx(math.exp(mean(nll_sparse)), rel=1e-12)
    assert report.perplexity_ratio == pytest.approx(
        math.exp(mean(nll_sparse) - mean(nll_dense)), rel=1e-12
    )
    assert report.kl_mean == pytest.approx(mean(kl), rel=1e-10)
    assert report.top1_agreement == mean(same)


class DecodeOnly(Fixed):
    """Dense on prompts, sparse on decode steps."""

    def __init__(self, dense: np.ndarray, sparse: np.ndarray) -> None:
        super().__init__(dense)
        self.sparse = sparse
        self.read: list[int] = []

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        self.read = input_ids[0].tolist()
        return super().prefill(input_ids)

    def decode_step(self, input_ids: np.ndarray) -> np.ndarray:
        self.read.append(int(input_ids[0, 0]))
        return self.sparse[input_ids]


def test_decode_only_sparsity_is_scored_where_it_acts() -> None:
    dense, sparse = _table(0), _table(1)
    window = np.random.default_rng(2).integers(7, size=11)
    session = DecodeOnly(dense, sparse)
    report = compare(Fixed(dense), session, [window], phases="decode")
    assert session.read == window[:-1].tolist()
    tail = compare(Fixed(dense), Fixed(sparse), [window[5:]])
    assert report == replace(tail, second_half=None)
    assert report.tokens == 5
    assert report.kl_mean > 0
    assert compare(Fixed(dense), session, [window]).kl_mean == 0


def test_equal_models_have_ratio_one_and_no_divergence() -> None:
    report = compare(Fixed(_table(0)), Fixed(_table(0)), [np.arange(7)])
    assert report.perplexity_ratio == 1.0
    assert report.kl_mean == 0.0
    assert report.top1_agreement == 1.0
    assert report.perplexity_ratio_stderr is None


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 3e38])
def test_log_softmax_of_extreme_logits_stays_a_distribution(scale: float) -> None:
    logits = np.array([[1.0, -1.0, 0.5, 0.0]], dtype=np.float32) * np.float32(scale)
    result = log_softmax(logits)
    assert result.dtype == np.float64
    assert np.exp(result).sum() == pytest.approx(1.0, abs=1e-12)
    assert not np.isnan(result).any()


def test_impossible_tokens_do_not_make_nan() -> None:
    dense = log_softmax(np.array([[0.0, -np.inf, 0.0]], dtype=np.float32))
    sparse = log_softmax(np.array([[0.0, 5.0, -np.inf]], dtype=np.float32))
    assert token_kl(dense, dense)[0] == 0.0
    assert token_kl(dense, sparse)[0] == np.inf  # sparse rules out what dense thinks likely
    assert token_nll(dense, np.array([1]))[0] == np.inf


def test_kl_of_a_known_pair() -> None:
    dense = np.log(np.array([[0.5, 0.5]]))
    sparse = np.log(np.array([[0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(dense, sparse)[0] == pytest.approx(expected, rel=1e-14)


def test_divergence_is_streaming() -> None:
    dense, sparse = log_softmax(_table(3)), log_softmax(_table(4))
    whole, parts = DivergenceSum(), DivergenceSum()
    whole.add(dense, sparse)
    for row in range(7):
        parts.add(dense[row : row + 1], sparse[row : row + 1])
    assert parts.kl_mean == pytest.approx(whole.kl_mean, rel=1e-14)
    assert parts.top1_agreement == whole.top1_agreement


def test_hopeless_perplexity_is_infinite_and_an_empty_one_an_error() -> None:
    sums = NllSum()
    with pytest.raises(ValueError, match="no token"):
        _ = sums.mean
    sums.add(np.array([1e6]))
    assert sums.perplexity == math.inf


def test_ratio_error_is_paired() -> None:
    """Windows that are all hard by the same amount leave no doubt about the ratio."""
    dense, sparse = NllSum(), NllSum()
    for level in (1.0, 3.0, 2.0):
        dense.add(np.full(4, level))
        sparse.add(np.full(4, level + 0.5))
    assert ratio_stderr(dense, sparse) == pytest.approx(0.0, abs=1e-15)
    dense.add(np.full(4, 1.0))
    sparse.add(np.full(4, 2.5))
    spread = np.std([0.5, 0.5, 0.5, 1.5], ddof=1)
    assert ratio_stderr(dense, sparse) == pytest.approx(math.exp(0.75) * spread / 2)


def test_continuations_that_part() -> None:
    dense = np.full((5, 5), -1.0)
    for now in range(5):
        dense[now, (now + 1) % 5] = 1.0  # 0 1 2 3 4 0 ...
    sparse = dense.copy()
    sparse[3] = np.eye(5)[0]  # after 3 comes 0
    prompts = np.array([[0, 0], [0, 3]])
    report = compare_continuations(Fixed(dense), Fixed(sparse), prompts, 4, progress=Silent())
    assert report.first_divergence == (3, 0)  # 1 2 3 | 4; and at once
    assert report.free_running_agreement == 3 / 8  # dense 4 0 1 2 against sparse 0 1 2 3
    assert report.guided_agreement == 6 / 8
    assert report.median_first_divergence == 1.5


def test_equal_continuations_never_diverge() -> None:
    tokens = np.array([[1, 2], [3, 4]])
    assert first_divergence(tokens, tokens) == [None, None]


def test_parity_in_lock_step() -> None:
    torch, onnx = Fixed(_table(0)), Fixed(_table(0))
    engine = Fixed(_table(0) + 0.25)
    prompts = np.array([[0, 1, 2], [3, 4, 5]])
    executors = {"torch": torch, "onnx": onnx, "engine": engine}
    report = compare_executors(executors, prompts, range(4), why_absent={})
    assert report.torch_onnx.max_abs == 0.0
    assert report.torch_onnx.tokens == 2 * (3 + 4)
    assert report.torch_engine.max_abs == pytest.approx(0.25, rel=1e-5)
    assert report.onnx_engine.greedy_identical
    assert torch.calls == ["prefill", *["decode"] * 4]


class Disturbed(Fixed):
    """Its logits are off in the latter half of each batch."""

    def prefill(self, input_ids: np.ndarray) -> np.ndarray:
        logits = super().prefill(input_ids).copy()
        logits[len(logits) // 2 :] += 0.5
        return logits

    decode_step = prefill


def test_the_noise_floor_of_parity_is_the_latter_half_of_a_batch() -> None:
    executors = {"torch": Disturbed(_table(0)), "onnx": Fixed(_table(0))}
    prompts = np.array([[0, 1, 2], [3, 4, 5]])
    report = compare_executors(executors, prompts, range(4), why_absent={"engine": ""}, twins=True)
    assert report.torch_onnx.max_abs == 0.0
    assert report.noise_floor.max_abs == pytest.approx(0.5, rel=1e-5)
    assert report.noise_floor.tokens == report.torch_onnx.tokens == 2 * (3 + 4)


def test_parity_sees_one_prompt_that_diverges() -> None:
    left, right = np.eye(5), np.eye(5)
    right[4] = [1, 0, 0, 0, 0]
    executors = {"onnx": Fixed(left), "engine": Fixed(right)}
    prompts = np.array([[4, 1], [1, 4]])  # the first disagrees before its last token: no matter
    report = compare_executors(executors, prompts, range(2), why_absent={"torch": "no memory"})
    leg = report.onnx_engine
    assert leg.prompts_diverged == 1
    assert not leg.greedy_identical
    assert leg.max_abs == 1.0
    assert report.torch_onnx == ParityLeg(why="no memory")


def test_parity_with_one_executor_measures_nothing() -> None:
    lonely = Fixed(_table(0))
    why = {"torch": "t", "engine": "e"}
    report = compare_executors({"onnx": lonely}, np.array([[0]]), range(2), why_absent=why)
    assert [leg.why for leg in (report.torch_onnx, report.torch_engine, report.onnx_engine)] == [
        "t",
        "t",
        "e",
    ]
    assert not lonely.calls


@pytest.mark.parametrize("rank", [0, 10, 50, 90, 99, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_percentile_is_numpys_linear_one(rank: float, size: int) -> None:
    samples = np.random.default_rng(size).standard_normal(size)
    (value,) = percentiles(samples, (rank,))
    assert value == pytest.approx(np.percentile(samples, rank), abs=1e-12)


@pytest.mark.parametrize(("samples", "rank"), [([], 50), ([1.0], 101), ([1.0], -1)])
def test_percentile_of_nonsense(samples: list[float], rank: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentiles(samples, (rank,))


def test_speedup_interval_holds_the_ratio_and_repeats() -> None:
    rng = np.random.default_rng(5)
    dense, sparse = (rng.normal(mean, 0.5, 40).tolist() for mean in (30.0, 20.0))
    low, high = speedup_interval(dense, sparse)
    assert low < 1.5 < high
    assert high - low < 0.1
    assert (low, high) == speedup_interval(dense, sparse)


def test_interleaving_alternates_and_drops_the_warmup() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    sides = {"dense": lambda: side("d"), "sparse": lambda: side("s")}
    dense, sparse = interleave(sides, range(3), warmup=1).values()
    assert "".join(order) == "ds" + "ds" + "sd" + "ds"
    assert dense == [3.0, 6.0, 7.0]
    assert sparse == [4.0, 5.0, 8.0]


def test_of_three_sides_each_begins_in_its_turn() -> None:
    order: list[str] = []
    interleave({name: functools.partial(order.append, name) for name in "abc"}, range(3), warmup=0)
    assert "".join(order) == "abc" + "bca" + "cab"


def test_rounds_last_as_long_and_are_as_many_as_asked_for() -> None:
    assert list(rounds_lasting(0.0, at_least=3)) == [0, 1, 2]
    assert len(list(rounds_lasting(0.01, at_least=1))) > 1


def test_summary_counts_tokens_of_a_median_run() -> None:
    figures = summary([10.0, 20.0, 30.0], tokens=4)
    assert figures.p50_ms == 20.0
    assert figures.tokens_per_s == 200.0
    assert figures.runs == 3
