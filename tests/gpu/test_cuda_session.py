"""On a GPU: the graph made for the CUDA provider, against the exported file on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.runtimes.cuda_session import CudaSession
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.tensorrt import library as tensorrt_library

from tests.support.exported import Exported, export_folder
from tests.support.slots import gpu_model
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not tensorrt_library.gpu_is_usable(), reason="no NVIDIA GPU with its driver is here"
)
POSITIONS = 1024
TOLERANCE = 2e-2
"""Float16 rounding of logits of about 2 through two layers, dense: no near tie falls otherwise."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("cuda-session")
    save_tiny_model(folder / "source", "mistral", head_dim=64, hidden_size=256, sliding_window=None)
    (folder / "export").mkdir()
    return export_folder(folder / "source", folder / "export", dtype="float16")


def opened(path: Path) -> CudaSession:
    return CudaSession(gpu_model(path, POSITIONS))


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


def test_dense_logits_are_the_cpus(exported: Exported):
    prompt = tokens(1, 40)
    with opened(exported.dense_model) as gpu, OrtSession(exported.dense_model) as cpu:
        assert np.abs(gpu.prefill(prompt) - cpu.prefill(prompt)).max() < TOLERANCE
        for seed in range(8):  # the first runs record the graph, the others replay it
            step = tokens(1, 1, seed)
            assert np.abs(gpu.decode_step(step) - cpu.decode_step(step)).max() < TOLERANCE


@pytest.mark.parametrize("side", ["model", "dense_model"])
def test_steps_are_the_same_bits_from_run_to_run(exported: Exported, side: str):
    prompts = tokens(2, 40)
    steps = [tokens(2, 1, seed) for seed in range(6)]

    def text(session: CudaSession, rows: slice) -> np.ndarray:
        session.prefill(prompts[rows])
        return np.concatenate([session.decode_step(step[rows]) for step in steps], axis=1)

    with opened(getattr(exported, side)) as session:
        first = text(session, slice(0, 1))
        np.testing.assert_array_equal(text(session, slice(0, 1)), first)
        # Two tokens take another plan of the decode kernel than one: same values, other last bits.
        assert np.abs(text(session, slice(0, 2))[:1] - first).max() < TOLERANCE


@pytest.mark.parametrize("batch", [2, 4, 8])
@pytest.mark.parametrize("side", ["model", "dense_model"])
def test_what_neighbours_hold_changes_no_bit(exported: Exported, side: str, batch: int):
    """The batch size stays fixed: it chooses the kernels, see plugins/bench/cuda."""
    with opened(getattr(exported, side)) as session:

        def text(seed: int) -> np.ndarray:
            own, others = tokens(1, 40), tokens(batch - 1, 40, seed)
            rows = np.concatenate([own, others])
            logits = [session.prefill(rows)[:1]]
            for step in range(6):
                row = np.concatenate([tokens(1, 1, step), tokens(batch - 1, 1, 100 * seed + step)])
                logits.append(session.decode_step(row)[:1])
            return np.concatenate(logits, axis=1)

        np.testing.assert_array_equal(text(1), text(2))


@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_chosen_on_the_gpu_are_those_of_the_logits(exported: Exported, batch: int):
    with opened(exported.model) as session:
        chosen, cache = session.next_tokens(None, tokens(batch, 40))
        for step in range(40):
            kept = session.keep(cache)
            logits, after = session.extend_last(kept, chosen[:, None])
            del after
            # Another token than the likeliest now and then: that one soon repeats itself.
            told = tokens(batch, 1, step) if step % 3 == 0 else chosen[:, None]
            if step % 3 == 0:
                logits, after = session.extend_last(kept, told)
                del after
            chosen, cache = session.next_tokens(kept, told)
            assert chosen.tolist() == logits[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize("batch", [1, 4])
def test_queued_steps_take_no_longer_than_awaited_ones_and_change_nothing(
    exported: Exported, batch: int
):
    with opened(exported.model) as session:
        chosen, cache = session.next_tokens(None, tokens(batch, 40))
        kept = session.keep(cache)
        before, after = session.extend_last(kept, chosen[:, None])
        del after
        took = session.queued_step_ms(kept, chosen[:, None], 50)
        assert took is not None
        assert 0 < took < 50
        np.testing.assert_array_equal(session.extend_last(kept, chosen[:, None])[0], before)


def test_a_text_that_outgrows_its_buffers_goes_on(exported: Exported):
    prompt = tokens(1, 510)
    with opened(exported.dense_model) as gpu, OrtSession(exported.dense_model) as cpu:
        gpu.prefill(prompt), cpu.prefill(prompt)
        for seed in range(6):
            step = tokens(1, 1, seed)
            assert np.abs(gpu.decode_step(step) - cpu.decode_step(step)).max() < TOLERANCE
