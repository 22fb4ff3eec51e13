"""Where two executors part, and what a report says of an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.report import engine_words, pages, rows
from nmexport.verification import cache_parity, parity

from tests.support.sample_report import sample_report
from tests.support.served import engine_of, tensorrt_document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nmexport.report.model import CacheParity

RNG = np.random.default_rng(0)
VALUES = {
    f"present.{layer}.{tensor}": RNG.standard_normal((2, 3, 5, 4), dtype=np.float32)
    for layer in range(4)
    for tensor in ("key", "value")
}


class Hidden:
    """A session that does not expose its cache."""

    exposes_cache = False


class Held:
    """A session that has nothing but a cache."""

    exposes_cache = True
    cache = None

    def __init__(self, **changes: np.ndarray) -> None:
        self.values = {**VALUES, **{name.replace("_", "."): x for name, x in changes.items()}}

    def cache_values(self, _: None) -> Iterator[tuple[str, np.ndarray]]:
        yield from self.values.items()


def told(dtype: str = "float16", **changes: np.ndarray) -> CacheParity:
    executors: Any = {parity.ONNX: Held(), parity.ENGINE: Held(**changes)}
    pair = (parity.ONNX, parity.ENGINE)
    return cache_parity.compare_where_possible(executors, pair, {}, dtype=dtype)


def test_the_first_layer_that_differs_is_named() -> None:
    later = {f"present_{layer}_key": VALUES[f"present.{layer}.key"] * 1.5 for layer in (2, 3)}
    found = told(**later, present_1_value=VALUES["present.1.value"] * 1.1)
    first = found.first_diverging
    assert first is not None
    assert (first.layer, first.tensor) == (1, "value")
    assert first.relative_error == pytest.approx(0.1, rel=1e-4)
    assert len(found.layers) == 8
    assert rows.cache_line(found) == (
        "the first to differ by more than 3 % is layer 1's value, by 10 %"
    )


def test_rounding_is_no_difference_and_depends_on_the_type() -> None:
    slightly = {"present_2_key": VALUES["present.2.key"] * 1.01}
    assert told(**slightly).first_diverging is None
    assert told("float32", **slightly).first_diverging.layer == 2
    assert "largest difference is layer 2's key, by 1 %" in str(rows.cache_line(told(**slightly)))


def test_one_token_of_many_is_no_difference() -> None:
    values = VALUES["present.0.key"].copy()
    values[0, :, 2] *= -1
    assert told(present_0_key=values).first_diverging is None


def test_what_is_not_a_number_differs() -> None:
    found = told(present_3_value=np.full((2, 3, 5, 4), np.nan, np.float32))
    first = found.first_diverging
    assert first is not None
    assert (first.layer, first.tensor) == (3, "value")
    assert "no numbers" in str(rows.cache_line(found))


def test_what_cannot_be_compared_says_why() -> None:
    one: Any = {parity.ONNX: Held(), parity.ENGINE: Hidden()}
    pair = (parity.ONNX, parity.ENGINE)
    found = cache_parity.compare_where_possible(one, pair, {}, dtype="float32")
    assert "does not expose its KV cache" in str(rows.cache_line(found))
    why = {parity.ENGINE: "no GPU"}
    found = cache_parity.compare_where_possible(
        {}, (parity.ENGINE, parity.ENGINE), why, dtype="float32"
    )
    assert rows.cache_line(found) == "not compared: no GPU"
    assert rows.cache_line(None) is None


@pytest.mark.parametrize("page", [pages.markdown, pages.html])
def test_pages_say_where_executors_part(tmp_path: Path, page: Any) -> None:
    report = sample_report(tmp_path, layers=2)
    assert "all layers agree within 0.1 %" in page(report)
    older = replace(report, parity=replace(report.parity, caches=None))
    assert "layer by layer" not in page(older)


# -- the engine's own part ----------------------------------------------------------------------


def engine_document(**changes: Any) -> dict[str, Any]:
    build = {
        "attention_layers": 30,
        "attention_kernels": {"gemm_mha_v2": 30, "gemv_mha_v1": 30},
        "plan_bytes": {"sparse": 299_000_000, "dense": 495_000_000},
        "weight_bytes": 269_000_000,
        "timing_cache": None,
        "why_no_timing_cache": "no need",
    }
    return {**tensorrt_document(**changes), "build": build}


def words_of(folder: Path, document: dict[str, Any]) -> str:
    return " ".join(engine_words.words(engine_words.section(engine_of(folder, **document))))


def test_attention_and_cache_are_told_as_they_were_built(tmp_path: Path) -> None:
    text = words_of(tmp_path, engine_document())
    assert text == (
        "tensorrt-rtx 1.7.1: all 30 attention layers run as fused kernels (gemm_mha_v2 30, "
        "gemv_mha_v1 30). The KV cache is updated in place. The dense plan takes 495.0 MB for "
        "269.0 MB of weights: each profile may hold weights in a layout of its own."
    )
    unread = words_of(tmp_path, engine_document(attention="attention layers"))
    assert "30 attention layers were given to the runtime" in unread
    assert "products and a softmax" in words_of(tmp_path, engine_document(attention="elementary"))
    copied = engine_document(in_place_cache=False, why_not_in_place="no TensorScatter")
    assert "copied to a longer one in every run (no TensorScatter)" in words_of(tmp_path, copied)


def test_onnx_runtime_has_no_such_part(tmp_path: Path) -> None:
    assert words_of(tmp_path, {"runtime": "onnxruntime", "runtime_version": "1.32"}) == ""
