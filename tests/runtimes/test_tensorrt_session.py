"""The TensorRT session's own logic, on a fake engine that computes with ONNX Runtime."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from nmexport.errors import ArtifactError, UserError
from nmexport.graph.tensorrt import for_tensorrt
from nmexport.runtimes.engine import PluginRecord, TensorRTEngine
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.runtimes.tensorrt.kernel_cache import KernelCache, kernel_cache_path
from nmexport.runtimes.tensorrt.library import Messages
from nmexport.runtimes.tensorrt.pair import input_axes
from nmexport.runtimes.tensorrt.profiles import Limits, profiles_for
from nmexport.runtimes.tensorrt_session import TensorRTSession

from tests.support.fake_tensorrt import HostDevice, fake_module, fake_plan
from tests.support.toy_lm import prefill_padded

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.runtimes.tensorrt.library import TensorRTTarget

    from tests.support.exported import Exported

LIMITS = Limits(max_batch=3, max_sequence=8, max_context=24, best_sequence=8, best_context=8)
RNG = np.random.default_rng(0)
IDS = RNG.integers(3, 300, (2, 20))


@pytest.fixture(scope="module")
def exported(plain_export: Exported) -> Path:
    return plain_export.dense_model


@pytest.fixture(params=[True, False], ids=["in place", "concatenated"])
def session(request: pytest.FixtureRequest, exported: Path) -> TensorRTSession:
    return open_fake(exported, in_place=request.param)


def open_fake(
    model: Path,
    *,
    in_place: bool,
    device: HostDevice | None = None,
    target: TensorRTTarget = "tensorrt",
    kernels: KernelCache | None = None,
    logger: Messages | None = None,
) -> TensorRTSession:
    rewritten = for_tensorrt(model, capacity=LIMITS.max_context if in_place else None)
    assert rewritten.in_place is in_place
    profiles = [dict(p.shapes) for p in profiles_for(input_axes(rewritten.model), LIMITS)]
    device = device or HostDevice()
    return TensorRTSession(
        trt=fake_module(device),
        plan=fake_plan(
            ir.to_proto(rewritten.model).SerializeToString(),
            model.parent,
            profiles,
            in_place=in_place,
        ),
        engine=description(in_place=in_place, target=target),
        device=device,
        logger=logger or Messages(),
        kernels=kernels,
    )


def description(*, in_place: bool, target: TensorRTTarget = "tensorrt") -> TensorRTEngine:
    return TensorRTEngine(
        target=target,
        version="99",
        dtype="float32",
        compute_capabilities=("8.9",),
        in_place_cache=in_place,
        why_not_in_place=None if in_place else "not asked for",
        attention="fused",
        max_batch=LIMITS.max_batch,
        max_sequence=LIMITS.max_sequence,
        max_context=LIMITS.max_context,
        profiles=("prefill", "decode"),
        plugin=PluginRecord(file="x.so", sha256="0" * 64, version="1", embedded=False),
    )


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_prompt_and_its_continuation_are_onnx_runtimes(
    session: TensorRTSession, exported: Path
) -> None:
    with OrtSession(exported, threads=1) as wanted, session:
        assert session.vocabulary_size == wanted.vocabulary_size
        assert session.limits == (LIMITS.max_batch, LIMITS.max_context)
        close(session.prefill(IDS[:, :7]), wanted.prefill(IDS[:, :7]))
        for at in range(7, 14):
            column = IDS[:, at : at + 1]
            close(session.decode_step(column), wanted.decode_step(column))


def test_a_prompt_longer_than_a_run_goes_in_pieces(
    session: TensorRTSession, exported: Path
) -> None:
    with OrtSession(exported, threads=1) as wanted, session:
        close(session.prefill(IDS), wanted.prefill(IDS))
        close(session.decode_step(IDS[:, :1]), wanted.decode_step(IDS[:, :1]))


def test_padding_on_the_left_counts_for_nothing(session: TensorRTSession, exported: Path) -> None:
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0
    with OrtSession(exported, threads=1) as wanted, session:
        ours, theirs = (prefill_padded(one, IDS[:, :6], mask) for one in (session, wanted))
        close(ours[0], theirs[0])
        close(ours[1, 2:], theirs[1, 2:])
        close(session.decode_step(IDS[:, 6:7]), wanted.decode_step(IDS[:, 6:7]))


def test_a_new_prompt_forgets_the_old_one(session: TensorRTSession) -> None:
    with session:
        first = session.prefill(IDS[:, :5])
        session.prefill(IDS[:, 5:12])
        close(session.prefill(IDS[:, :5]), first)
        one = session.prefill(IDS[:1, :5])  # another batch: other buffers
        close(one, first[:1])


def test_a_state_survives_what_follows_and_goes_to_another_session(
    session: TensorRTSession, exported: Path
) -> None:
    in_place = session._described.in_place_cache
    with session, open_fake(exported, in_place=in_place) as other:
        assert session.exposes_cache
        session.prefill(IDS[:, :6])
        state = session.keep(session.cache)
        wanted = session.decode_step(IDS[:, 6:7])
        session.prefill(IDS[:, 9:12])
        session.cache = session.resume(state)
        close(session.decode_step(IDS[:, 6:7]), wanted)
        other.cache = other.resume(state)
        close(other.decode_step(IDS[:, 6:7]), wanted)
        session.cache = session.resume(state)
        close(session.decode_step(IDS[:, 6:7]), wanted)


def test_sequences_take_turns_on_kept_caches(session: TensorRTSession) -> None:
    with session:
        rows = (IDS[:1], IDS[1:2])
        wanted = [session.prefill(row[:, :8])[:, 6:] for row in rows]
        caches = [session.keep(session.extend(None, row[:, :6])[1]) for row in rows]
        for row, kept, logits in zip(rows, caches, wanted, strict=True):
            first, cache = session.extend(kept, row[:, 6:7])
            second, _ = session.extend(cache, row[:, 7:8])
            close(np.concatenate([first, second], axis=1), logits)


def test_a_cache_that_another_run_overwrote_is_refused(session: TensorRTSession) -> None:
    with session:
        _, first = session.extend(None, IDS[:1, :4])
        _, second = session.extend(None, IDS[1:2, :4])
        for use in (session.keep, session.resume, lambda old: list(session.cache_values(old))):
            with pytest.raises(RuntimeError, match="overwritten"):
                use(first)
        with pytest.raises(RuntimeError, match="overwritten"):
            session.extend(first, IDS[:1, 4:5])
        session.extend(second, IDS[1:2, 4:5])


def test_the_cache_is_read_as_onnx_runtime_has_it(session: TensorRTSession, exported: Path) -> None:
    with OrtSession(exported, threads=1) as wanted, session:
        for one in (session, wanted):
            assert one.exposes_cache
            one.prefill(IDS[:, :7])
            one.decode_step(IDS[:, 7:8])
        pairs = list(
            zip(session.cache_values(session.cache), wanted.cache_values(wanted.cache), strict=True)
        )
        for (name, ours), (other, theirs) in pairs:
            assert name == other
            assert ours.shape == theirs.shape == (2, 2, 8, 16)
            close(ours, theirs)
        assert [name for (name, _), _ in pairs[:2]] == ["present.0.key", "present.0.value"]


def test_decode_steps_are_recorded_once_and_replayed(exported: Path) -> None:
    device = HostDevice()
    with open_fake(exported, in_place=True, device=device) as session:
        session.prefill(IDS[:1, :4])
        for at in range(4, 9):
            session.decode_step(IDS[:1, at : at + 1])
        assert device.launches == 4  # all but the first
        session.prefill(IDS[:, :4])  # another batch is recorded anew
        session.decode_step(IDS[:, 4:5])
        assert device.launches == 4


@pytest.mark.parametrize("refusing", ["capturable", "capturable_engine"])
def test_what_cannot_be_recorded_still_runs_and_is_not_tried_again(
    exported: Path, refusing: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = HostDevice(**{refusing: False})
    with (
        caplog.at_level(logging.WARNING),
        open_fake(exported, in_place=True, device=device) as session,
        OrtSession(exported, threads=1) as wanted,
    ):
        session.prefill(IDS[:1, :4])
        wanted.prefill(IDS[:1, :4])
        for at in range(4, 8):
            column = IDS[:1, at : at + 1]
            close(session.decode_step(column), wanted.decode_step(column))
    assert (device.launches, device.captures) == (0, 1)
    (record,) = caplog.records
    assert "without a CUDA graph" in record.getMessage()


@pytest.mark.parametrize("in_place", [True, False])
def test_tensorrt_rtx_records_decode_steps_itself_where_their_shape_is_fixed(
    exported: Path, *, in_place: bool
) -> None:
    device = HostDevice()
    with open_fake(exported, in_place=in_place, device=device, target="tensorrt-rtx") as session:
        configs = [context.config for context in session._engine.contexts]
        session.prefill(IDS[:1, :4])
        for at in range(4, 7):
            session.decode_step(IDS[:1, at : at + 1])
    assert device.captures == 0
    assert [config.cuda_graph_strategy for config in configs] == [
        "disabled",
        "whole" if in_place else "disabled",
    ]
    assert [config.dynamic_shapes_kernel_specialization_strategy for config in configs] == [
        "lazy",
        "eager" if in_place else "lazy",
    ]


def test_compiled_kernels_are_kept_for_the_next_process(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "x.kernels"

    def run() -> KernelCache:
        kept = KernelCache(path)
        with open_fake(exported, in_place=True, target="tensorrt-rtx", kernels=kept) as session:
            configs = [context.config for context in session._engine.contexts]
            assert configs[0].cache is configs[1].cache
            session.prefill(IDS[:1, :4])
        return kept

    run()
    assert path.read_bytes() == b"ours\nprofile 1\nprofile 2"
    path.write_bytes(b"ours\nolder")
    assert run()._cache.kernels == {"older", "profile 1", "profile 2"}
    before = path.stat().st_mtime_ns
    run()  # nothing new
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"another machine's\nolder")
    run()
    assert path.read_bytes() == b"ours\nprofile 1\nprofile 2"
    assert sorted(one.name for one in path.parent.iterdir() if one.suffix != ".lock") == [path.name]


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(
    exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept = KernelCache(tmp_path / "file" / "x.kernels")
    with open_fake(exported, in_place=True, target="tensorrt-rtx", kernels=kept) as session:
        session.prefill(IDS[:1, :4])
    assert "kernels are not kept" in caplog.text


def test_kernels_are_kept_by_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = description(in_place=True, target="tensorrt-rtx")
    long = bytes(1 << 18)
    paths = {kernel_cache_path(engine, plan) for plan in (b"a", b"b", long, long + b"\0")}
    assert len(paths) == 4
    assert all(path.parent == tmp_path / "nmexport" for path in paths)
    assert kernel_cache_path(engine, b"a") in paths


def test_a_refusal_is_not_told_with_the_errors_of_another_day(exported: Path) -> None:
    logger = Messages()
    logger.add("ERROR: long ago", error="long ago")
    session = open_fake(exported, in_place=True, logger=logger)
    session._described = replace(session._described, max_sequence=16)
    with session, pytest.raises(ArtifactError) as refused:
        session.prefill(IDS[:1, :16])
    assert "long ago" not in str(refused.value)


def test_more_than_the_engine_holds_is_refused(session: TensorRTSession) -> None:
    with session:
        with pytest.raises(UserError, match="at most 3"):
            session.prefill(np.ones((4, 2), np.int64))
        with pytest.raises(UserError, match=r"at most 24.*\n.*max_context"):
            session.prefill(np.ones((1, 25), np.int64))
        session.prefill(np.ones((1, 24), np.int64))
        with pytest.raises(UserError, match="25 tokens"):
            session.decode_step(np.ones((1, 1), np.int64))
        with pytest.raises(UserError, match="2 sequences go on where 1"):
            session.decode_step(np.ones((2, 1), np.int64))


def test_nothing_decodes_before_a_prompt(session: TensorRTSession) -> None:
    with session, pytest.raises(RuntimeError, match="before the first prefill"):
        session.decode_step(IDS[:, :1])


def test_closing_frees_the_device(exported: Path) -> None:
    device = HostDevice()
    session = open_fake(exported, in_place=True, device=device)
    session.prefill(IDS[:, :5])
    state = session.keep(session.cache)
    session.close()
    del session
    gc.collect()
    assert len(device.live) == len(state.buffers)
    del state
    gc.collect()
    assert not device.live


def test_a_broken_plan_is_refused_with_the_runtimes_words(exported: Path) -> None:
    device = HostDevice()
    with pytest.raises(ArtifactError, match="the plan is broken"):
        TensorRTSession(
            trt=fake_module(device),
            plan=b"broken",
            engine=description(in_place=True),
            device=device,
            logger=Messages(),
        )


def test_shapes_outside_the_profile_are_told(exported: Path) -> None:
    session = open_fake(exported, in_place=True)
    session._described = replace(session._described, max_sequence=16)  # more than was built for
    with session, pytest.raises(ArtifactError, match=r"input_ids .*\(1, 16\) outside"):
        session.prefill(IDS[:1, :16])
