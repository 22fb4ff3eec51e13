"""The GPU's time of a step, and the host's beyond it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.progress import Silent
from nmexport.report.rows import host_lines
from nmexport.verification import alone, latency

from tests.support.sample_report import Paced, sample_report

if TYPE_CHECKING:
    from pathlib import Path


class OnGpu(Paced):
    """A step takes a caller 2 ms, and the device as many as are told, in turn."""

    on_gpu = True

    def __init__(self, *device_ms: float | None) -> None:
        self.device_ms = list(device_ms)
        self.queued: list[tuple[object, tuple[int, ...], int]] = []

    def extend(self, cache: object, input_ids: np.ndarray) -> tuple[np.ndarray, object]:
        time.sleep(2e-3)
        return super().extend(cache, input_ids)

    def queued_step_ms(self, cache: object, input_ids: np.ndarray, times: int) -> float | None:
        assert self.cache is None, "what went on from the cache is still held"
        self.queued.append((cache, input_ids.shape, times))
        return self.device_ms[len(self.queued) % len(self.device_ms)]


def timing(batch: int = 3) -> latency.Timing:
    return latency.Timing(
        prompt=np.zeros((1, 8), np.int64),
        context=np.zeros((batch, 8), np.int64),
        runs=3,
        warmup=0,
        device="a GPU",
        progress=Silent(),
    )


def test_the_hosts_time_is_what_a_step_takes_beyond_the_devices() -> None:
    dense, sparse = OnGpu(1.0), OnGpu(0.2, 0.9, 0.3, 0.4, 0.1)
    times = latency.compare(dense, sparse, timing())
    assert times.dense.decode.device_ms == 1.0
    assert times.sparse.decode.device_ms == 0.3
    assert times.sparse.decode.p50_ms is not None
    assert times.sparse.decode.host_us == pytest.approx((times.sparse.decode.p50_ms - 0.3) * 1e3)
    assert times.sparse.decode.host_us > 1000
    assert sparse.queued == [((), (3, 1), latency.QUEUED_STEPS)] * latency.QUEUED_ROUNDS


def test_the_dense_model_in_integers_is_timed_in_the_same_turns() -> None:
    times = latency.compare(OnGpu(1.0), OnGpu(0.2), timing(), stored=OnGpu(0.5))
    assert times.stored is not None
    assert times.stored.decode.device_ms == 0.5
    assert times.stored.prefill.runs == times.dense.prefill.runs == 3
    assert times.over_stored is not None
    assert times.over_stored.decode == pytest.approx(
        (times.stored.decode.p50_ms or 0) / (times.sparse.decode.p50_ms or 1)
    )
    assert latency.compare(OnGpu(1.0), OnGpu(0.2), timing()).stored is None


def test_no_device_time_without_a_gpu_or_a_queue() -> None:
    times = latency.compare(Paced(), OnGpu(None), timing())
    for side in (times.dense, times.sparse):
        assert side.decode.p50_ms is not None
        assert (side.decode.device_ms, side.decode.host_us) == (None, None)


def test_a_sparse_model_alone_has_a_device_time() -> None:
    assert alone.time(OnGpu(0.5), timing()).sparse.decode.device_ms == 0.5


def test_the_report_says_it(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    assert host_lines(report.latency) == []
    decode = replace(report.latency.sparse.decode, device_ms=2.9514, host_us=47.93)
    sparse = replace(report.latency.sparse, decode=decode)
    assert host_lines(replace(report.latency, sparse=sparse)) == [
        "Decode, sparse: 2.95 ms on the GPU, 48 us beyond it on the host."
    ]
