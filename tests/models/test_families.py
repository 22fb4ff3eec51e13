"""Every supported family: what ONNX Runtime computes is what torch computes.

One export a family. Sequences run beyond the sliding window of the families that have one, the
second sequence of the batch is padded on the left, and the last tokens are decoded on the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.runtimes import native

from tests.support.exported import Exported, export_folder, load, onnx_logits, torch_logits
from tests.support.tiny import FAMILIES, VOCABULARY, WINDOW, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

LENGTH, PREFILL, PADDING = WINDOW + 12, WINDOW + 6, 5


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    source, output = (tmp_path_factory.mktemp(request.param) for _ in range(2))
    save_tiny_model(source, request.param)
    return export_folder(source, output)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, attention_mask)` `[2, LENGTH]`."""
    input_ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, LENGTH))
    attention_mask = np.ones((2, LENGTH), np.int64)
    attention_mask[1, :PADDING] = 0
    return input_ids, attention_mask


def agree(actual: np.ndarray, expected: np.ndarray, attention_mask: np.ndarray) -> None:
    real = attention_mask.astype(bool)
    assert np.isfinite(actual).all(), "padding must not make NaN: it would spread in the cache"
    np.testing.assert_allclose(actual[real], expected[real], rtol=1e-3, atol=1e-3)


def test_dense_baseline_is_the_model(exported: Exported, batch: tuple[np.ndarray, ...]) -> None:
    actual = onnx_logits(exported.dense_model, *batch, prefill=PREFILL)
    agree(actual, torch_logits(exported.dense, *batch), batch[1])


def test_sparse_with_no_library(exported: Exported, batch: tuple[np.ndarray, ...]) -> None:
    actual = onnx_logits(exported.model, *batch, prefill=PREFILL)
    agree(actual, torch_logits(exported.sparse, *batch), batch[1])


def test_sparse_with_native_op(exported: Exported, batch: tuple[np.ndarray, ...]) -> None:
    library = native.find_library()
    if library is None:
        pytest.skip("the native library is not built")
    actual = onnx_logits(exported.model, *batch, prefill=PREFILL, library=library)
    agree(actual, torch_logits(exported.sparse, *batch), batch[1])


def test_sparsity_shows(exported: Exported, batch: tuple[np.ndarray, ...]) -> None:
    """The two references differ, or agreement with either would prove nothing."""
    dense, sparse = (torch_logits(m, *batch) for m in (exported.dense, exported.sparse))
    assert np.abs(dense - sparse).max() > 0.1


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_batch_crosses_the_window(
    family: str, batch: tuple[np.ndarray, ...], tmp_path: Path
) -> None:
    """The sequences are long enough for a window that is ignored to show in the tests above."""
    save_tiny_model(tmp_path, family)
    model = load(tmp_path)
    windowed = torch_logits(model, *batch)
    model.config.sliding_window = 10 * LENGTH
    difference = np.abs(torch_logits(model, *batch) - windowed)
    assert difference[0, :WINDOW].max() == 0
    assert difference[0, -1].max() > 0.01
