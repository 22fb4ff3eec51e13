"""bfloat16 models on a processor: what they compute, and what of them stays bfloat16."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
import pytest
from nmexport import graph
from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.graph import cpu
from nmexport.graph.cpu import is_bfloat16, widen_file
from nmexport.models.source import ModelSource
from nmexport.recipe import GatesSection, ModelSection
from nmexport.runtimes import native
from nmexport.runtimes.engine import Side
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.selection import Selection
from nmexport.sparsity.linear import Behaviour
from nmexport.sparsity.pattern import NMPattern
from nmexport.stages import package, verify
from nmexport.store.work_directory import WorkDirectory
from nmexport.verification import audit, op_parity
from nmexport.verification.reference import TorchSession, array_from
from onnx import TensorProto

from tests.stages.test_engine import RECIPE
from tests.support.exported import PATTERN, Exported, export_folder, load, specs_of, torch_logits
from tests.support.pipelines import pipeline_in
from tests.support.served import engine_of
from tests.support.tiny import VOCABULARY, save_tiny_model
from tests.support.toy_lm import save_toy_lm

if TYPE_CHECKING:
    from pathlib import Path

BFLOAT16 = TensorProto.BFLOAT16
LENGTH, PREFILL = 24, 10
IDS = np.random.default_rng(0).integers(3, VOCABULARY, (3, LENGTH))
# Attention as one node or as many, an output head of its own or the embedding's, biases.
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "gemma2": {},
    "qwen2": {},
}
# What has a bfloat16 kernel on a processor and moves elements alone.
MOVING = {"Cast", "Gather", "Transpose", "Concat"}


def export(name: str, folder: Path, **options: object) -> tuple[Path, Exported]:
    """A tiny model and its export in bfloat16."""
    source, output = folder / "source", folder / "export"
    output.mkdir()
    save_tiny_model(source, name.partition("-")[0], **MODELS[name])
    return source, export_folder(source, output, dtype="bfloat16", **options)


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Exported]:
    return export(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=["native", "bodies"])
def library(request: pytest.FixtureRequest) -> Path | None:
    return native_library() if request.param == "native" else None


def native_library() -> Path:
    found = native.find_library()
    if found is None:
        pytest.skip("the native library is not built here")
    return found


def stepwise(session: OrtSession, ids: np.ndarray) -> np.ndarray:
    """Logits of a prompt and of the tokens decoded after it."""
    logits = [session.prefill(ids[:, :PREFILL])]
    logits += [session.decode_step(ids[:, at : at + 1]) for at in range(PREFILL, LENGTH)]
    return np.concatenate(logits, axis=1)


# -- what is computed -----------------------------------------------------------------------------


def test_the_dense_model_is_nearer_to_float32_than_torch_in_bfloat16(
    model: tuple[Path, Exported], library: Path | None
) -> None:
    """The same rounded weights; torch rounds every result to 8 bits, we those of linears alone.

    Logits reach 2, and round to steps of 1/128 there; four such steps are allowed.
    """
    source, exported = model
    wanted = torch_logits(load(source, "bfloat16").float(), IDS, np.ones_like(IDS))
    in_torch = torch_logits(exported.dense, IDS, np.ones_like(IDS))
    with OrtSession(exported.dense_model, library=library, threads=1, bfloat16=True) as session:
        got = stepwise(session, IDS)
    assert np.abs(got - wanted).max() < 4 / 128
    assert np.abs(got - wanted).mean() < np.abs(in_torch - wanted).mean()


def test_each_sparse_linear_keeps_the_op_contract(
    model: tuple[Path, Exported], library: Path | None
) -> None:
    _, exported = model
    layers = specs_of(exported.dense, Behaviour(pattern=PATTERN))
    graph, outputs = op_parity.instrument(exported.model)

    def tensors_of(name: str) -> dict[str, np.ndarray]:
        return {kind: array_from(value) for kind, value in exported.tensors[name].items()}

    with audit.open_instrumented(graph, exported.folder, library=library, threads=1) as session:
        report, _ = op_parity.check(session, layers, outputs, tensors_of, IDS[0])
    assert report.linears == len(layers)
    assert report.within_contract, report


def test_audit_counts_what_a_bfloat16_model_keeps(model: tuple[Path, Exported]) -> None:
    _, exported = model
    report = audit.audit(
        exported.model,
        exported.dense_model,
        specs_of(exported.dense, Behaviour(pattern=PATTERN)),
        library=native_library(),
        threads=1,
        windows=[IDS[0]],
        error_window=IDS[1],
    )
    assert report.achieved == pytest.approx(0.5, abs=0.01)
    assert all(0.0 < layer.relative_error < 2.0 for layer in report.layers)


def test_a_prompt_in_pieces_gives_the_bits_of_the_whole(model: tuple[Path, Exported]) -> None:
    """A token's keys, rounded in the cache, are the ones that its own step saw."""
    _, exported = model
    for path in (exported.model, exported.dense_model):
        with OrtSession(path, library=native_library(), threads=1, bfloat16=True) as session:
            whole = session.prefill(IDS[:1])
            first, cache = session.extend(None, IDS[:1, :PREFILL])
            rest, _ = session.extend(cache, IDS[:1, PREFILL:])
            one_by_one = stepwise(session, IDS[:1])
        np.testing.assert_array_equal(np.concatenate([first, rest], axis=1), whole)
        np.testing.assert_array_equal(one_by_one, whole)


def test_neighbours_in_the_batch_change_no_bit(model: tuple[Path, Exported]) -> None:
    _, exported = model
    for path in (exported.model, exported.dense_model):
        with OrtSession(path, library=native_library(), threads=2, bfloat16=True) as session:
            alone = stepwise(session, IDS[:1])
            for batch in (IDS[:2], IDS[[0, 2]], IDS):
                np.testing.assert_array_equal(stepwise(session, batch)[:1], alone)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_linear_that_keeps_everything_is_the_dense_one(name: str, tmp_path: Path) -> None:
    _, exported = export(name, tmp_path, behaviour=Behaviour(pattern=NMPattern(16, 16)))
    results = []
    for path in (exported.model, exported.dense_model):
        with OrtSession(path, library=native_library(), threads=1, bfloat16=True) as session:
            results.append(stepwise(session, IDS))
    np.testing.assert_array_equal(*results)


def test_the_noise_floor_is_not_rounded_away(model: tuple[Path, Exported]) -> None:
    """One part in ten million is: the report would call every difference of executors an error."""
    session = TorchSession(model[1].dense, VOCABULARY)
    both = np.concatenate([IDS, IDS])
    exact, twins = np.split(session.with_twins().prefill(both), 2)
    np.testing.assert_array_equal(exact, np.split(session.prefill(both), 2)[0])
    difference = np.abs(twins - exact)
    assert 0 < difference.mean() < 8 / 128


# -- what the graph is ----------------------------------------------------------------------------


def graph_of(path: Path, *, has_native_ops: bool) -> onnx.GraphProto:
    return onnx.load_model_from_string(widen_file(path, has_native_ops=has_native_ops)).graph


def narrow_values(graph: onnx.GraphProto) -> set[str]:
    """Names of the bfloat16 values, by each node's own rule."""
    narrow = {one.name for one in graph.initializer if one.data_type == BFLOAT16}
    narrow |= {one.name for one in graph.input if one.type.tensor_type.elem_type == BFLOAT16}
    for node in graph.node:
        if node.op_type == "Cast":
            is_narrow = node.attribute[0].i == BFLOAT16
        else:
            is_narrow = not narrow.isdisjoint(node.input) and node.op_type != "Shape"
        narrow.update(node.output if is_narrow else ())
    return narrow


@pytest.mark.parametrize("has_native_ops", [True, False])
def test_only_linears_and_moves_touch_bfloat16(
    model: tuple[Path, Exported], has_native_ops: bool
) -> None:
    for path in (model[1].model, model[1].dense_model):
        graph = graph_of(path, has_native_ops=has_native_ops)
        narrow = narrow_values(graph)
        touching = Counter(
            node.op_type
            for node in graph.node
            if not narrow.isdisjoint([*node.input, *node.output])
        )
        assert touching.keys() - {"Shape"} <= MOVING | {"NMLinear"}
        assert {value.name for value in graph.output} <= narrow
        assert not any(value.type.tensor_type.elem_type == BFLOAT16 for value in graph.value_info)


def test_inputs_and_outputs_keep_names_types_and_shapes(model: tuple[Path, Exported]) -> None:
    for path in (model[1].model, model[1].dense_model):
        old, new = (
            onnx.load(path, load_external_data=False).graph,
            graph_of(path, has_native_ops=True),
        )
        assert list(new.input) == list(old.input)
        assert list(new.output) == list(old.output)


def test_weights_are_read_from_the_file_as_they_lie_there(model: tuple[Path, Exported]) -> None:
    _, exported = model
    for path in (exported.model, exported.dense_model):
        old = {one.name: one for one in onnx.load(path, load_external_data=False).graph.initializer}
        graph = graph_of(path, has_native_ops=True)
        new = {one.name: one for one in graph.initializer}
        assert all(new[name] == tensor for name, tensor in old.items())
        turned = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Transpose"}
        linears = [node for node in graph.node if node.op_type == "NMLinear"]
        weights = [new[turned.get(node.input[1], node.input[1])] for node in linears]
        assert all(one.data_type == BFLOAT16 for one in weights)
        assert all(one.data_location == TensorProto.EXTERNAL for one in weights)


def test_dense_products_become_linears_that_keep_everything(
    model: tuple[Path, Exported],
) -> None:
    path = model[1].dense_model
    old = onnx.load(path, load_external_data=False).graph
    constants = {one.name for one in old.initializer}
    constants |= {
        n.output[0] for n in old.node if n.op_type == "Transpose" and n.input[0] in constants
    }
    products = [n for n in old.node if n.op_type == "MatMul" and n.input[1] in constants]
    graph = graph_of(path, has_native_ops=True)
    linears = [node for node in graph.node if node.op_type == "NMLinear"]
    assert [node.name for node in linears] == [node.name for node in products]
    for node in linears:
        numbers = {one.name: one.i for one in node.attribute}
        assert numbers["n"] == numbers["m"] == 16
    biased = [node for node in linears if len(node.input) == 3]
    assert len(biased) == sum(n.name.endswith("add_bias") for n in old.node)
    assert "NMLinear" not in {n.op_type for n in graph_of(path, has_native_ops=False).node}


def test_a_value_is_cast_once_for_all_who_read_it(model: tuple[Path, Exported]) -> None:
    for path in (model[1].model, model[1].dense_model):
        casts = [n for n in graph_of(path, has_native_ops=True).node if n.op_type == "Cast"]
        made = Counter((n.input[0], n.attribute[0].i) for n in casts)
        assert max(made.values()) == 1


def test_channels_that_sixteen_does_not_divide(tmp_path: Path) -> None:
    """No result depends on the group of a linear that keeps everything."""
    values = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    narrow = onnx.helper.make_tensor("w", BFLOAT16, [6, 5], values.reshape(-1))
    x = onnx.helper.make_tensor_value_info("x", BFLOAT16, ["t", 6])
    y = onnx.helper.make_tensor_value_info("y", BFLOAT16, ["t", 5])
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="p")]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [x], [y], [narrow]),
        opset_imports=[onnx.helper.make_opsetid("", 23)],
    )
    onnx.save(proto, tmp_path / "m.onnx")
    (node,) = graph_of(tmp_path / "m.onnx", has_native_ops=True).node
    assert {one.name: one.i for one in node.attribute} == {"n": 6, "m": 6}


# -- which models are rewritten -------------------------------------------------------------------


def test_other_models_are_opened_as_they_are(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> bytes:
        raise AssertionError("rewritten")

    monkeypatch.setattr(cpu, "widen_file", never)
    half = save_toy_lm(tmp_path / "half.onnx", dtype=TensorProto.FLOAT16)
    for path in (tiny_export / "model.onnx", tiny_export / "dense" / "model.onnx", half):
        assert not is_bfloat16(onnx.load(path, load_external_data=False))
        with OrtSession(path, threads=1) as session:
            session.prefill(IDS[:1] % session.vocabulary_size)


def test_a_bfloat16_model_is_rewritten_once(model: tuple[Path, Exported]) -> None:
    for path in (model[1].model, model[1].dense_model):
        assert is_bfloat16(onnx.load(path, load_external_data=False))
        rewritten = widen_file(path, has_native_ops=True)
        assert rewritten != path.read_bytes()
        assert widen_file(rewritten, has_native_ops=True) == rewritten, "never twice"


@pytest.mark.parametrize("element_type", ["float32", "float16", "bfloat16"])
def test_an_engine_says_what_is_rewritten(tmp_path: Path, element_type: str) -> None:
    """bfloat16 models on a CPU, but for the one that a package has ready."""
    engine = engine_of(tmp_path, element_type=element_type)
    packaged = engine_of(tmp_path, element_type=element_type, cpu_model="model.cpu.onnx")
    is_bfloat16 = element_type == "bfloat16"
    for side in get_args(Side):
        assert engine.needs_rewrite("cpu", side) == is_bfloat16
        assert not engine.needs_rewrite("cuda", side)
    assert not packaged.needs_rewrite("cpu")
    assert packaged.needs_rewrite("cpu", "dense") == is_bfloat16


def test_without_onnx_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_toy_lm(tmp_path / "model.onnx", dtype=BFLOAT16)
    monkeypatch.setitem(sys.modules, "nmexport.graph.cpu", None)
    monkeypatch.delattr(graph, "cpu")
    with pytest.raises(EnvironmentFault, match="needs the package onnx"):
        OrtSession(path, bfloat16=True)


def test_a_model_that_onnx_cannot_read_is_the_artifacts_fault() -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        widen_file(b"\xff" * 64, has_native_ops=True)


def test_what_is_cut_off_is_no_model(tmp_path: Path) -> None:
    whole = save_toy_lm(tmp_path / "model.onnx", dtype=BFLOAT16).read_bytes()
    empty = tmp_path / "empty.onnx"
    empty.touch()
    cut = [whole[:size] for size in range(0, len(whole), len(whole) // 20)]
    for model in (*cut, empty, b"\xff" * 64):
        with pytest.raises(ArtifactError):
            OrtSession(model, bfloat16=True)


# -- the whole job --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense_baseline", "weights"),
    [(True, "float"), (False, "float"), pytest.param(True, "int8", marks=pytest.mark.slow)],
)
def test_a_build_goes_through_every_stage(
    tiny_llama: Path, tmp_path: Path, dense_baseline: bool, weights: str
) -> None:
    gates = None if dense_baseline else GatesSection(max_peak_rss_bytes=1 << 40)
    section = ModelSection(
        id="tiny", dtype="bfloat16", dense_baseline=dense_baseline, weights=weights
    )
    recipe = RECIPE.model_copy(
        update={"model": section, "target": "onnxruntime", "gates": gates or RECIPE.gates}
    )
    source = ModelSource(
        id="tiny", revision=None, folder=tiny_llama, gguf_file=None, digest="1" * 64
    )
    work = WorkDirectory(tmp_path / "w")
    pipeline_in(work.root, recipe, source).run(Selection())
    report = verify.Artifact(work.require("verify")).report
    assert report.accuracy.sparse.perplexity > 1
    parity = report.parity
    executors = [
        name for name in ("torch", "onnx", "engine") if getattr(parity.linears, name).linears
    ]
    assert all(getattr(parity.linears, name).within_contract for name in executors)
    assert parity.caches.first_diverging is None
    assert package.Artifact(work.require("package")).bundle.pattern == str(recipe.sparsity.pattern)
