"""Steps of many sequences on the CPU: the exported model's logits, and everyone's own bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nmexport.errors import ArtifactError
from nmexport.graph import shared_step
from nmexport.graph.attention_form import NotRewritableError
from nmexport.graph.shared_step import rewrite_for_shared_step
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_opening import EXTERNAL_DATA_FOLDER
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.session import Work
from nmexport.runtimes.step_session import StepSession

from tests.support.exported import Exported, export_folder
from tests.support.tiny import FAMILIES, VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POSITIONS = 512
TOLERANCE = 1e-5
"""Rounding of float32 sums in another order; logits are about 2."""
CAPPED = "gemma2"
"""Caps attention scores."""

pytestmark = pytest.mark.skipif(native.find_library() is None, reason="no native library")


def opened(path: Path, *, threads: int = 2) -> StepSession:
    model = ir.load(path)
    rewrite_for_shared_step(model, positions=POSITIONS)
    return StepSession(
        ir.to_proto(model).SerializeToString(),
        positions=POSITIONS,
        library=native.require_library(),
        threads=threads,
        config={EXTERNAL_DATA_FOLDER: str(path.parent)},
    )


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != CAPPED])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(f"step-{request.param}")
    save_tiny_model(folder / "source", request.param)
    (folder / "export").mkdir()
    return export_folder(folder / "source", folder / "export")


@pytest.fixture(scope="module")
def session(exported: Exported) -> Iterator[StepSession]:
    with opened(exported.model) as one:
        yield one


@pytest.mark.parametrize("side", ["model", "dense_model"])
def test_a_step_gives_the_exported_logits_and_caches(exported: Exported, side: str) -> None:
    path: Path = getattr(exported, side)
    prompt = tokens(2 * 70).reshape(2, 70)
    with opened(path) as stepping, OrtSession(path) as whole:
        assert_close(stepping.prefill(prompt), whole.prefill(prompt))
        for seed in range(3):
            step = tokens(2, seed)[:, None]
            assert_close(stepping.decode_step(step), whole.decode_step(step))
        caches = zip(
            stepping.cache_values(stepping.cache), whole.cache_values(whole.cache), strict=True
        )
        for (name, got), (wanted_name, wanted) in caches:
            assert name == wanted_name
            assert_close(got, wanted)


def test_padding_is_left_out(exported: Exported, session: StepSession) -> None:
    prompts, mask = tokens(3 * 20).reshape(3, 20), np.ones((3, 20), np.int64)
    mask[1, :7] = mask[2, :15] = 0
    with OrtSession(exported.model) as whole:
        got, cache = session.extend(None, prompts, mask)
        wanted, wanted_cache = whole.extend(None, prompts, mask)
        assert_close(got[mask == 1], wanted[mask == 1])
        assert not got[mask == 0].any()
        step = tokens(3, 2)[:, None]
        assert_close(session.extend(cache, step)[0], whole.extend(wanted_cache, step)[0])


def solo(session: StepSession, ids: np.ndarray) -> np.ndarray:
    return session.extend(None, ids[None])[0][0]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_sequence_gets_its_solo_bits(session: StepSession, data: st.DataObject) -> None:
    """Any mix of lengths, arrivals, departures, chunks and shared beginnings."""
    draw = data.draw
    count = draw(st.integers(1, 6), "sequences")
    texts = [tokens(draw(st.integers(1, 150), "length"), seed) for seed in range(count)]
    if draw(st.booleans(), "alike") and count > 1:
        shared = min(len(texts[0]), len(texts[1]))
        texts[1][: shared // 2] = texts[0][: shared // 2]
    alone = [solo(session, text) for text in texts]
    caches, done = [None] * count, [0] * count
    leaves = [draw(st.sampled_from([False, False, True]), "leaves") for _ in texts]
    for _ in range(400):
        waiting = [i for i in range(count) if done[i] < len(texts[i])]
        if not waiting:
            return
        chosen = draw(st.lists(st.sampled_from(waiting), unique=True, min_size=1), "step")
        work, takes = [], []
        for i in chosen:
            take = min(
                draw(st.sampled_from([1, 1, 2, 7, 33, 64]), "chunk"), len(texts[i]) - done[i]
            )
            takes.append(take)
            work.append(Work(caches[i], texts[i][done[i] : done[i] + take]))
        for i, take, (logits, cache, _) in zip(chosen, takes, session.step(work), strict=True):
            done[i] += take
            caches[i] = cache
            np.testing.assert_array_equal(logits, alone[i][done[i] - 1])
            if leaves[i] and done[i] > len(texts[i]) // 2:
                done[i], caches[i] = len(texts[i]), None


def test_a_region_gives_the_bits_of_its_nodes(
    exported: Exported, session: StepSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt and some steps, beside the same graph node by node."""
    monkeypatch.setattr(shared_step, "GroupIntoRegions", lambda: lambda _: None)
    text = tokens(75)
    with opened(exported.model) as by_node:
        np.testing.assert_array_equal(solo(session, text), solo(by_node, text))
        caches = [by_node.extend(None, text[None])[1], session.extend(None, text[None])[1]]
        for seed in range(3):
            steps = [
                side.extend(cache, tokens(1, seed)[None])
                for side, cache in zip((by_node, session), caches, strict=True)
            ]
            np.testing.assert_array_equal(steps[0][0], steps[1][0])
            caches = [cache for _, cache in steps]


def test_one_thread_gives_the_bits_of_two(exported: Exported, session: StepSession) -> None:
    text = tokens(300)
    with opened(exported.model, threads=1) as other:
        np.testing.assert_array_equal(solo(other, text), solo(session, text))


def test_a_shared_beginning_costs_no_bit_and_no_page(session: StepSession) -> None:
    text, other = tokens(100), tokens(100, seed=1)
    other[:70] = text[:70]
    _, cache = session.extend(None, text[None])
    used = session._pool.used
    start = session.beginning(cache, 70)
    assert session._pool.used == used
    logits, extended = session.extend(start, other[None, 70:])
    np.testing.assert_array_equal(logits[0], solo(session, other)[70:])
    after, _ = session.extend(cache, tokens(1, 5)[None])
    whole = np.concatenate([text, tokens(1, 5)])
    np.testing.assert_array_equal(after[0, -1], solo(session, whole)[-1])
    del extended


def test_a_cache_does_not_change_and_branches_share_nothing_that_differs(
    session: StepSession,
) -> None:
    _, cache = session.extend(None, tokens(9)[None])
    branches = [session.extend(cache, tokens(3, seed)[None])[0] for seed in (1, 2, 1)]
    np.testing.assert_array_equal(branches[0], branches[2])
    for seed, logits in zip((1, 2), branches, strict=False):
        whole = np.concatenate([tokens(9), tokens(3, seed)])
        np.testing.assert_array_equal(logits[0], solo(session, whole)[9:])


def test_another_sessions_cache_is_taken_over(exported: Exported, session: StepSession) -> None:
    with opened(exported.model) as other:
        _, cache = other.extend(None, tokens(50)[None])
        logits, _ = session.extend(session.resume(other.keep(cache)), tokens(1, 3)[None])
        wanted, _ = other.extend(cache, tokens(1, 3)[None])
    np.testing.assert_array_equal(logits, wanted)


def test_pages_are_free_again_when_caches_are_gone(session: StepSession) -> None:
    session.cache = None
    before = session._pool.used
    caches = [session.extend(None, tokens(200, seed)[None])[1] for seed in range(20)]
    assert session._pool.used == before + 20 * 7
    del caches
    assert session._pool.used == before


def test_a_sequence_beyond_the_tables_is_refused(session: StepSession) -> None:
    with pytest.raises(ArtifactError, match="513 tokens are more"):
        session.extend(None, tokens(POSITIONS + 1)[None])


def test_a_capped_model_is_left_as_it_is(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "source", CAPPED)
    (tmp_path / "export").mkdir()
    model = ir.load(export_folder(tmp_path / "source", tmp_path / "export").model)
    with pytest.raises(NotRewritableError):
        rewrite_for_shared_step(model, positions=POSITIONS)


def test_logits_that_somebody_holds_are_not_written_again(session: StepSession) -> None:
    _, cache = session.extend(None, tokens(40)[None])
    steps = [[Work(cache, tokens(1, seed))] for seed in (1, 2)]
    ((first, _, _),) = session.step(steps[0])
    kept = first.copy()
    ((second, _, _),) = session.step(steps[1])
    np.testing.assert_array_equal(first, kept)
    place = second.ctypes.data
    del second
    ((again, _, _),) = session.step(steps[0])
    np.testing.assert_array_equal(again, kept)
    assert again.ctypes.data == place
