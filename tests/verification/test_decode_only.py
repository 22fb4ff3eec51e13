"""Decode-only sparsity read off a model that is sparse in all phases, by handing over a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.progress import Silent
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.sparsity.linear import Behaviour
from nmexport.verification.accuracy import LateLogits, compare, decode_only
from nmexport.verification.reference import TorchSession

from tests.support.exported import PATTERN, Exported, export_folder
from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.report.model import Scores
    from nmexport.runtimes.session import Session

WINDOWS = np.random.default_rng(3).integers(3, VOCABULARY, size=(4, 24))


@pytest.fixture(scope="module")
def everywhere(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_folder(
        tiny_llama,
        tmp_path_factory.mktemp("all"),
        behaviour=Behaviour(pattern=PATTERN, variance_correction=True),
    )


@pytest.fixture(scope="module")
def decoding(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_folder(
        tiny_llama,
        tmp_path_factory.mktemp("decode"),
        behaviour=Behaviour(pattern=PATTERN, variance_correction=True, phase="decode"),
    )


def scored(dense: Session, sparse: Session, late: LateLogits) -> Scores:
    batches = [WINDOWS[:3], WINDOWS[3:]]
    return decode_only(dense, sparse, batches, late=late, progress=Silent(), label="decode-only")


def test_it_equals_a_model_that_was_built_decode_only(
    everywhere: Exported, decoding: Exported
) -> None:
    with (
        OrtSession(everywhere.dense_model) as dense,
        OrtSession(everywhere.model) as sparse,
        OrtSession(decoding.model) as built,
    ):
        expected = compare(dense, built, WINDOWS, phases="decode")
        handed = scored(dense, sparse, LateLogits(0))
        late = LateLogits(3 * 4 * VOCABULARY * (WINDOWS.shape[1] // 2))  # of three windows
        whole = compare(dense, sparse, WINDOWS, late=late)
        assert scored(dense, sparse, late) == handed
        assert late.take(WINDOWS[0]) is None
    for figure in ("tokens", "windows", "perplexity_ratio", "kl_mean", "top1_agreement"):
        assert getattr(handed, figure) == pytest.approx(getattr(expected, figure), rel=1e-5), figure
    assert expected.second_half is None
    # Beside it: the same tokens, of which none was read by a dense model.
    assert whole.second_half.tokens == handed.tokens
    assert whole.second_half.dense.perplexity == pytest.approx(handed.dense.perplexity, rel=1e-5)
    assert whole.second_half.perplexity_ratio != pytest.approx(handed.perplexity_ratio, rel=1e-3)


def test_a_runtime_that_hands_nothing_over_says_so(everywhere: Exported) -> None:
    with TorchSession(everywhere.sparse, VOCABULARY) as session:
        figures = scored(session, session, LateLogits(0))
    assert figures.perplexity_ratio is None
    assert "handed over" in figures.why
