"""The ONNX Runtime session: cache, padding, and what it says when something is missing."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.runtimes import native, onnxruntime_opening, onnxruntime_session
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.feeds import positions_from_mask
from nmexport.runtimes.native import HUGE_PAGES_ENTRY, engine_library
from nmexport.runtimes.onnxruntime_opening import SESSION_CONFIG, choose_provider, read_model
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.store.artifact import file_digest
from onnx import TensorProto

from tests.support.served import engine_document
from tests.support.toy_lm import VOCABULARY, expected_logits, prefill_padded, save_toy_lm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.support.exported import Exported

IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_lm(tmp_path_factory.mktemp("toy") / "model.onnx")


def test_decode_on_the_cache_equals_one_prefill(toy: Path) -> None:
    with OrtSession(toy, threads=1) as session:
        whole = session.prefill(IDS)
        steps = [session.prefill(IDS[:, :2])]
        steps += [session.decode_step(IDS[:, at : at + 1]) for at in range(2, IDS.shape[1])]
    assert session.vocabulary_size == VOCABULARY
    np.testing.assert_allclose(whole, expected_logits(IDS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=1e-6, atol=1e-6)


def test_prefill_drops_the_cache(toy: Path) -> None:
    with OrtSession(toy, threads=1) as session:
        first = session.prefill(IDS)
        session.decode_step(IDS[:, :1])
        np.testing.assert_array_equal(session.prefill(IDS), first)


def test_left_padding_changes_no_result(toy: Path) -> None:
    padded = np.array([[0, 0, 7, 8], [1, 2, 3, 4]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    with OrtSession(toy, threads=1) as session:
        prefill_padded(session, padded, mask)
        step = session.decode_step(np.array([[9], [9]]))
    np.testing.assert_allclose(
        step[0, 0], expected_logits(np.array([[7, 8, 9]]))[0, -1], rtol=1e-5, atol=1e-5
    )


def test_restored_state_decodes_the_same_again(toy: Path) -> None:
    with OrtSession(toy, threads=1) as session:
        session.prefill(IDS)
        state = session.keep(session.cache)
        first = session.decode_step(IDS[:, :1])
        session.decode_step(IDS[:, :1])
        session.cache = session.resume(state)
        np.testing.assert_array_equal(session.decode_step(IDS[:, :1]), first)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(TensorProto.FLOAT16, 2e-3), (TensorProto.BFLOAT16, 2e-2)]
)
def test_half_precision_caches_and_logits(tmp_path: Path, dtype: int, rtol: float) -> None:
    path = save_toy_lm(tmp_path / "model.onnx", dtype=dtype)
    with OrtSession(path, threads=1) as session:
        session.prefill(IDS[:, :-1])
        logits = session.decode_step(IDS[:, -1:])
        cached = dict(session.cache_values(session.cache))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(IDS)[:, -1:], rtol=rtol, atol=20 * rtol)
    with OrtSession(save_toy_lm(tmp_path / "float32.onnx"), threads=1) as session:
        session.prefill(IDS)
        for name, wanted in session.cache_values(session.cache):
            np.testing.assert_allclose(cached[name], wanted, rtol=rtol, atol=rtol)


def test_positions_count_from_the_first_real_token() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(positions_from_mask(mask, 2), [[1, 2], [3, 4]])
    np.testing.assert_array_equal(positions_from_mask(mask, 5), [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_decode_before_prefill_is_our_bug(toy: Path) -> None:
    with OrtSession(toy, threads=1) as session, pytest.raises(RuntimeError, match="prefill"):
        session.decode_step(IDS[:, :1])
    with pytest.raises(RuntimeError, match="closed"):
        session.prefill(IDS)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """What sessions are told from now on, session by session."""
    seen: list[Mapping[str, str]] = []
    real = onnxruntime_opening.session_options

    def watched(*, config: Mapping[str, str], **others: Any) -> Any:
        seen.append(config)
        return real(config=config, **others)

    monkeypatch.setattr(onnxruntime_session, "session_options", watched)
    return seen


@pytest.mark.parametrize(
    ("share_of_free", "told", "expected"),
    [(0.2, {}, "1"), (0.3, {}, "0"), (0.3, {HUGE_PAGES_ENTRY: "1"}, "1")],
)
def test_weights_are_copied_where_there_is_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: list[Mapping[str, str]],
    *,
    share_of_free: float,
    told: dict[str, str],
    expected: str,
) -> None:
    model = save_toy_lm(tmp_path / "model.onnx")
    with (tmp_path / "model.onnx.data").open("wb") as weights:
        weights.truncate(1_000_000)
    monkeypatch.setattr(onnxruntime_opening, "free_memory", lambda: 1_000_000 / share_of_free)
    OrtSession(model, config={**SESSION_CONFIG, **told}).close()
    assert entries[0][HUGE_PAGES_ENTRY] == expected


def test_an_instrumented_copy_runs_too_briefly(toy: Path, entries: list[Mapping[str, str]]) -> None:
    OrtSession(toy.read_bytes()).close()
    assert entries[0][HUGE_PAGES_ENTRY] == "0"


def test_missing_library_is_the_machines_fault(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"no\.so does not exist"):
        OrtSession(toy, library=tmp_path / "no.so")


def test_a_file_that_is_no_library(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.so").write_bytes(b"not a library")
    with pytest.raises(EnvironmentFault, match="does not load"):
        OrtSession(toy, library=tmp_path / "bad.so")
    assert not capfd.readouterr().err


def test_a_file_of_another_version_of_the_contract(plain_export: Exported, tmp_path: Path) -> None:
    model = onnx.load(plain_export.model, load_external_data=False)
    next(entry for entry in model.opset_import if entry.domain == "nmexport").version = 1
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    for library in (None, native.find_library()):
        with pytest.raises(ArtifactError, match=r"holds nmexport ops of version 1\.") as refusal:
            OrtSession(path, library=library, threads=1)
        assert "export the model again" in str(refusal.value.fix)


def test_corrupt_and_missing_models(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(toy.read_bytes()[:200])
    with pytest.raises(ArtifactError, match="cannot be opened"):
        OrtSession(broken)
    with pytest.raises(ArtifactError, match="does not exist"):
        OrtSession(tmp_path / "absent.onnx")
    with pytest.raises(ArtifactError, match=r"absent\.onnx cannot be read: No such file") as caught:
        read_model(tmp_path / "absent.onnx")
    assert caught.value.fix == "run `nmexport engine --force`"
    assert not capfd.readouterr().err


def _engine(folder: Path, **changes: object) -> Path:
    document = engine_document(
        **{"model": "../model.onnx", "dense_model": "../model.onnx", **changes}
    )
    folder.mkdir()
    (folder / "engine.json").write_text(json.dumps(document))
    return folder


def test_engine_opens_relative_to_itself(toy: Path, tmp_path: Path) -> None:
    save_toy_lm(tmp_path / "model.onnx")
    with OrtSession.from_engine(_engine(tmp_path / "engine")) as session:
        np.testing.assert_allclose(session.prefill(IDS), expected_logits(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"schema": 9}, {"runtime": "openvino"}, {"library": 3}, {"model": None}]
)
def test_foreign_engine_descriptions_are_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        read_engine(_engine(tmp_path / "engine", **changes))


def test_engine_refuses_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmexport.runtimes import native

    library = tmp_path / "libnmexport.so"
    library.write_bytes(b"one build")
    monkeypatch.setattr(native, "require_library", lambda: library)
    entry = {"file": library.name, "sha256": file_digest(library)}
    engine = read_engine(_engine(tmp_path / "engine", library=entry))
    assert engine_library(engine) == library
    library.write_bytes(b"another build")
    with pytest.raises(ArtifactError, match="another build"):
        engine_library(engine)


def test_cuda_is_chosen_only_where_all_three_parts_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nmexport import environment
    from nmexport.runtimes import native

    import onnxruntime

    library = tmp_path / "library.so"
    gpu = environment.Gpu(name="a GPU", driver="1", compute_capability="9.0", memory_bytes=1)
    machine = environment.probe()
    carried = {"cuda": "90"}
    assert choose_provider(None) == "cpu"
    assert choose_provider(library) == "cpu"  # the CPU's onnxruntime
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(native, "describe_library", lambda _: carried)
    assert choose_provider(library) == "cpu"  # no GPU
    monkeypatch.setattr(environment, "probe", lambda: dataclasses.replace(machine, gpus=(gpu,)))
    assert choose_provider(library) == "cuda"
    carried["cuda"] = ""
    assert choose_provider(library) == "cpu"  # the library carries no kernels for it


def test_a_provider_that_does_not_start_is_no_silent_cpu(toy: Path) -> None:
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(EnvironmentFault, match="could not start CUDAExecutionProvider"),
    ):
        OrtSession(toy, threads=1, provider="cuda")


def test_an_unknown_provider_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"provider is 'tpu', not one of cpu, cuda"):
        read_engine(_engine(tmp_path / "engine", provider="tpu"))
