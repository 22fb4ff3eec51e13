"""The audit: counters beside the nodes count what the op keeps, and change nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from nmexport.errors import ArtifactError
from nmexport.graph.functions import function_protos_for
from nmexport.oracle import nm_prune
from nmexport.progress import peak_rss_bytes
from nmexport.sparsity.pattern import NMPattern
from nmexport.store.layers import LayerSpec
from nmexport.verification import audit, instrument, memory
from nmexport.verification.reference import TorchSession
from onnx import TensorProto, helper, numpy_helper

from tests.support.toy_lm import POSITIONS, VOCABULARY, WIDTH, embeddings, save_toy_lm

if TYPE_CHECKING:
    from pathlib import Path

IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
ORDER = np.array([2, 0, 3, 1], dtype=np.int32)
SCALE = np.array([1.0, 4.0, 0.25, 1.0], dtype=np.float32)
SHIFT = np.array([0.5], dtype=np.float32)


def _layer(**changes: object) -> LayerSpec:
    return LayerSpec(
        **{
            "name": "lm_head",
            "in_features": WIDTH,
            "out_features": VOCABULARY,
            "pattern": NMPattern(1, 2),
            "criterion": "act",
            "relative_error": 0.25,
            **changes,
        }
    )


def _sparse(path: Path, *, phase: str = "all", dynamic: bool = False, extras: bool = False) -> Path:
    """The toy model with its head as NMLinear, `hidden` its input."""
    model = onnx.load(save_toy_lm(path))
    head = next(node for node in model.graph.node if node.name == "lm_head")
    inputs = ["hidden", "head", ""]
    constants = {}
    if extras:
        constants = {"shift": SHIFT, "scale": SCALE, "order": ORDER}
        inputs += ["shift", "", "scale", "order"]
    elif dynamic:
        constants = {"columns": embeddings()["head"].sum(axis=0)}
        inputs += ["", "columns"]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "NMLinear",
        inputs,
        list(head.output),
        name="lm_head",
        domain="nmexport",
        n=1,
        m=2,
        dynamic_shift=int(dynamic),
        phase=phase,
    )
    place = list(model.graph.node).index(head)
    model.graph.node.remove(head)
    model.graph.node.insert(place, node)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    model.opset_import.append(helper.make_opsetid("nmexport", 2))
    model.functions.extend(function_protos_for([model.graph.node[place]], opset=18))
    onnx.save(model, path)
    return path


def _hidden(ids: np.ndarray) -> np.ndarray:
    weights = embeddings()
    return weights["tokens"][ids].cumsum(axis=0) + weights["positions"][: len(ids)]


def _run(path: Path, dense: Path, layer: LayerSpec) -> dict:
    return audit.audit(
        path,
        dense,
        [layer],
        library=None,
        threads=1,
        windows=[IDS, IDS[::-1].copy()],
        error_window=IDS,
    )


def test_errors_are_those_of_the_linears_output(tmp_path: Path) -> None:
    dense = save_toy_lm(tmp_path / "dense" / "model.onnx")
    report = _run(_sparse(tmp_path / "model.onnx"), dense, _layer())
    hidden = _hidden(IDS).astype(np.float32)
    kept = np.asarray(nm_prune(hidden, n=1, m=2), dtype=np.float32)
    head = embeddings()["head"]
    expected = np.linalg.norm((kept - hidden) @ head) / np.linalg.norm(hidden @ head)
    row = report.layers[0]
    assert row.relative_error == pytest.approx(expected, rel=1e-5)
    assert row.calibrated_error == 0.25
    assert report.achieved == 0.5
    assert (row.kept, row.total) == (2 * 8 * 2, 2 * 8 * 4)


def test_the_original_graph_still_computes_the_same(tmp_path: Path) -> None:
    from nmexport.runtimes.onnxruntime_session import OrtSession

    path = _sparse(tmp_path / "model.onnx", extras=True)
    graph = instrument.read_graph(path)
    instrument.add_counters(graph, [_layer()])
    with (
        OrtSession(path, threads=1) as plain,
        audit.open_instrumented(graph, tmp_path, library=None, threads=1) as counting,
    ):
        np.testing.assert_array_equal(plain.prefill(IDS[None]), counting.prefill(IDS[None]))


@pytest.mark.parametrize(("dynamic", "extras"), [(True, False), (False, True)])
def test_natural_zeros_after_the_shift_count_as_zeros(
    tmp_path: Path, dynamic: bool, extras: bool
) -> None:
    """Hidden states made to equal the shift: nothing is left to keep, whatever the mask."""
    path = _sparse(tmp_path / "model.onnx", dynamic=dynamic, extras=extras)
    model = onnx.load(path)
    zeros = {"tokens": np.zeros((VOCABULARY, WIDTH)), "positions": np.full((POSITIONS, WIDTH), 0.5)}
    for initializer in model.graph.initializer:
        if initializer.name in zeros:
            value = zeros[initializer.name].astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    onnx.save(model, path)
    dense = save_toy_lm(tmp_path / "dense" / "model.onnx")
    report = _run(path, dense, _layer())
    assert report.layers[0].kept == 0
    assert report.achieved == 1.0


@pytest.mark.parametrize(
    ("phase", "tokens"), [("all", 8), ("prefill", 8 - audit.DECODE_STEPS), ("decode", 4)]
)
def test_only_tokens_of_the_sparse_phase_count(tmp_path: Path, phase: str, tokens: int) -> None:
    dense = save_toy_lm(tmp_path / "dense" / "model.onnx")
    path = _sparse(tmp_path / "model.onnx", phase=phase)
    row = _run(path, dense, _layer(phase=phase)).layers[0]
    assert row.total == 2 * tokens * WIDTH
    assert row.kept * 2 == row.total
    assert row.relative_error is not None
    assert row.relative_error > 0.1  # a dense token has none


def test_layers_of_another_build_are_refused(tmp_path: Path) -> None:
    graph = instrument.read_graph(_sparse(tmp_path / "model.onnx"))
    with pytest.raises(ArtifactError, match=r"no NMLinear node for model\.other"):
        instrument.add_counters(graph, [_layer(name="model.other")])
    with pytest.raises(ArtifactError, match="no value nowhere"):
        instrument.add_layer_outputs(graph, {"lm_head": "nowhere"})


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff nonsense")
    with pytest.raises(ArtifactError, match="cannot be read"):
        instrument.read_graph(tmp_path / "model.onnx")


def test_layer_outputs_are_taken_in_chunks_of_bounded_size() -> None:
    layers = [_layer(name=str(index), out_features=1 << 14) for index in range(10)]
    chunks = list(audit.chunks_by_bytes(layers, lambda _: 1 << 26))
    assert [layer.name for chunk in chunks for layer in chunk] == [str(one) for one in range(10)]
    assert max(len(chunk) for chunk in chunks) == 4
    assert len(list(audit.chunks_by_bytes(layers, lambda _: 1 << 40))) == 10


def test_relative_error_of_nothing_is_unknown() -> None:
    assert audit.relative_error(np.ones(3), np.zeros(3)) is None
    assert audit.relative_error(np.zeros(3), np.ones(3)) == 1.0


def test_no_counted_token_is_no_sparsity() -> None:
    report = audit.sparsity([_layer()], {"lm_head": (0, 0)}, {"lm_head": None})
    assert report.achieved is None
    assert report.layers[0].achieved is None


def test_a_linear_that_keeps_every_channel_is_not_sparsified() -> None:
    """A budget stores some linears in integers and leaves them dense."""
    dense = _layer(name="dense", pattern=NMPattern(2, 2))
    counts = {"lm_head": (8, 16), "dense": (16, 16)}
    report = audit.sparsity([_layer(), dense], counts, dict.fromkeys(counts))
    assert report.sparsified == 1
    assert len(report.layers) == 2


# -- memory ----------------------------------------------------------------------------------------


def test_own_peak_memory_grows_and_is_plausible() -> None:
    before = peak_rss_bytes()
    held = np.ones(30_000_000 // 8)
    assert held.sum() > 0
    assert before <= peak_rss_bytes() < 1 << 40


def test_a_child_does_not_count_its_parents_memory() -> None:
    held = np.ones(400_000_000 // 8)
    code = "from nmexport.progress import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held.sum() > 0
    assert int(done.stdout) < 2e8


def test_a_model_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    figure = memory.run_in_fresh_process(tmp_path / "engine.json", "sparse", prompt_tokens=4)
    assert figure.peak_rss_bytes is None
    assert "engine.json cannot be read" in figure.why
    assert figure == memory.answer(str(tmp_path / "engine.json"), "sparse", "4")


def test_a_measuring_process_that_dies_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.sys, "executable", shutil.which("false"))
    figure = memory.run_in_fresh_process(tmp_path, "dense", prompt_tokens=4)
    assert figure.peak_rss_bytes is None
    assert "ended with code 1" in figure.why


def test_artifact_bytes_leave_the_baseline_out(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "model.onnx").write_bytes(b"x" * 1000)
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    assert memory.artifact_bytes(tmp_path) == 10


# -- the torch reference ---------------------------------------------------------------------------


def test_torch_session_decodes_on_its_cache(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = IDS[None, :]
    with TorchSession(model, 384) as session:
        whole = session.prefill(ids)
        session.prefill(ids[:, :-1])
        step = session.decode_step(ids[:, -1:])
    np.testing.assert_allclose(step[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)
    assert session.vocabulary_size == 384
    with pytest.raises(RuntimeError, match="closed"):
        session.prefill(ids)


def test_value_info_of_counters_is_a_number(tmp_path: Path) -> None:
    graph = instrument.read_graph(_sparse(tmp_path / "model.onnx"))
    counters = instrument.add_counters(graph, [_layer()])
    output = {value.name: value for value in graph.graph.output}[counters[0].output]
    assert output.type.tensor_type.elem_type == TensorProto.INT64
