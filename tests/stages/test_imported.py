"""Checkpoints that came quantised, from the folder to the file: integers stay, logits are right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from nmexport.environment import probe
from nmexport.errors import RecipeError
from nmexport.models.imported import imported_weights
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.pipeline import Pipeline
from nmexport.progress import Silent
from nmexport.recipe import (
    CorpusSection,
    EvaluationSection,
    ModelSection,
    Recipe,
    SparsitySection,
)
from nmexport.runtimes import native
from nmexport.runtimes.onnxruntime_session import OrtSession
from nmexport.selection import Selection
from nmexport.stages import fold, storing
from nmexport.store.work_directory import WorkDirectory
from nmexport.verification.reference import open_folded

from tests.support.exported import onnx_logits, torch_logits
from tests.support.quantised_checkpoints import (
    save_awq,
    save_compressed_tensors,
    save_fp8,
    save_gptq,
)
from tests.support.tiny_gguf import save_tiny_gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nmexport.choices import Dtype, Target

IDS = np.random.default_rng(5).integers(3, 300, (1, 24))
MASK = np.ones_like(IDS)
AS_IT_IS = {"pattern": "16:16", "mitigations": (), "grouping": "consecutive"}
EVERYTHING = {"mitigations": ("l-pts", "var", "ls", "gain", "bias", "low-rank"), "effort": "fast"}


GGUF_TYPES = {
    "self_attn": "Q8_0",
    "gate_proj": "Q4_0",
    "down_proj": "Q5_0",
    "lm_head": "Q8_0",
    "embed_tokens": "Q4_0",
}


def _gguf(plain: Path, path: Path) -> Path:
    save_tiny_gguf(plain, path, types=GGUF_TYPES)
    return path


def _w8a8(plain: Path, path: Path) -> Path:
    save_compressed_tensors(plain, path, "W8A8")
    return path


SAVED: dict[str, Callable[[Path, Path], Path]] = {
    "awq": lambda plain, path: save_awq(plain, path) and path,
    "gptq": lambda plain, path: save_gptq(plain, path, act_order=True) and path,
    "gguf": lambda plain, path: _gguf(plain, path.with_suffix(".gguf")),
    "compressed-tensors": _w8a8,
}


class Told(Silent):
    """Remembers what a build says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def build(
    model: Path, work: Path, last: str = "export", *, dtype: Dtype = "float32", **sparsity: Any
) -> tuple[Path, str]:
    """Build with values that are not rounded; returns the work directory and what was said."""
    recipe = Recipe(
        model=ModelSection(id=str(model), activations="float", dtype=dtype),
        sparsity=SparsitySection.model_validate({"criterion": "act", **sparsity}),
        calibration=CorpusSection(samples=8, length=32, learning_samples=8),
        evaluation=EvaluationSection(windows=2, length=32),
        target="onnxruntime",
    )
    directory, told = WorkDirectory(work), Told()
    Pipeline(
        recipe=recipe,
        source=resolve(recipe.model),
        environment=probe(),
        work=directory,
        progress=told,
    ).run(Selection(last=last))
    return directory, " ".join(told.notes)


def reference(model: Path) -> Any:
    return torch_logits(load_model(resolve(ModelSection(id=str(model)))), IDS, MASK)


@pytest.mark.parametrize(
    "kind",
    ["gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in SAVED if name != "gguf")],
)
def test_the_file_gives_the_logits_of_the_checkpoint(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = SAVED[kind](tiny_llama, tmp_path / "model")
    work, told = build(model, tmp_path / "work", **AS_IT_IS)
    assert "weights kept as they are stored" in told
    expected = reference(model)
    if kind == "gguf":
        graph = onnx.load(work.require("export") / "model.onnx", load_external_data=False).graph
        shapes = {item.name: (item.data_type, list(item.dims)) for item in graph.initializer}
        assert shapes["model.embed_tokens.weight.values"] == (onnx.TensorProto.INT8, [384, 64])
        assert shapes["model.embed_tokens.weight.scale"] == (onnx.TensorProto.FLOAT, [384, 2])
        assert "model.embed_tokens.weight" not in shapes
        assert shapes["lm_head.W"] == (onnx.TensorProto.INT8, [64, 384])
    for library in {None, native.find_library()}:
        file = work.require("export") / "model.onnx"
        made = onnx_logits(file, IDS, MASK, prefill=12, library=library)
        assert np.abs(made - expected).max() <= 1e-5 * expected.std()


def test_8_bit_floats_are_kept_for_a_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "gpu_runs", lambda _: True)
    save_fp8(tiny_llama, tmp_path / "model", block=32)
    work, told = build(tmp_path / "model", tmp_path / "work", dtype="float16", **AS_IT_IS)
    assert "weights kept as they are stored" in told
    path = work.require("export") / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {item.name: (item.data_type, list(item.dims)) for item in graph.initializer}
    down = "model.layers.0.mlp.down_proj"
    assert shapes[f"{down}.W"] == (onnx.TensorProto.FLOAT8E4M3FN, [128, 64])
    assert shapes[f"{down}.weight_scale"] == (onnx.TensorProto.FLOAT, [4, 64])
    expected = reference(tmp_path / "model")
    with OrtSession(path) as session:
        made = session.prefill(IDS)
    assert np.abs(made - expected).max() <= 0.02 * expected.std()


@pytest.mark.parametrize(("block", "keeps"), [(32, True), (48, False), (8, False)])
def test_8_bit_floats_in_blocks_that_no_op_has_are_dequantised(
    tiny_llama: Path, tmp_path: Path, block: int, *, keeps: bool
) -> None:
    save_fp8(tiny_llama, tmp_path / "model", block=block)
    source = resolve(ModelSection(id=str(tmp_path / "model")))
    for keeps_float8 in (True, False):
        imported = imported_weights(source, keeps_float8=keeps_float8)
        assert imported is not None
        weight = imported.linear("model.layers.0.mlp.down_proj")
        assert (weight is not None) == (keeps and keeps_float8)
        assert any(kind.reason is None for kind in imported.kept.kinds) == (weight is not None)


@pytest.fixture(scope="module")
def learned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A GPTQ checkpoint with act-order at 8:16, with all that can be learned."""
    folder = tmp_path_factory.mktemp("learned")
    model = SAVED["gptq"](tiny_llama, folder / "model")
    return model, *build(model, folder / "work", **EVERYTHING)


def test_learning_leaves_the_integers_alone(learned: tuple[Path, Any, str]) -> None:
    model, work, told = learned
    assert "low-rank not used" in told
    imported = imported_weights(resolve(ModelSection(id=str(model))))
    assert imported is not None
    folded = fold.Artifact(work.require("fold"))
    assert len(folded.layers) == 14
    for layer in folded.layers:
        assert "low-rank" not in layer.mitigations
        weight, tensors = imported.linear(layer.name), folded.tensors(layer.name)
        assert weight is not None
        assert layer.weight_type == weight.type == "int4"
        own, order = weight.channel_order, folded.input_order(layer.name)
        assert own is not None
        assert (order is None) == (not layer.name.endswith("down_proj"))
        dense = torch.empty_like(weight.values)
        dense[own.long()] = weight.values
        rows = (tensors["channel_order"] if order is None else order).long()
        reader = None if layer.outputs_for is None else folded.input_order(layer.outputs_for)
        columns = slice(None) if reader is None else reader.long()
        assert torch.equal(tensors["W"], dense[rows][:, columns]), layer.name
        assert {"value_scale", "bias", "shift"} <= set(tensors)
    kept = folded.kept
    assert kept is not None
    assert kept.left_out == ("low-rank",)


def test_the_file_holds_integers(learned: tuple[Path, Any, str]) -> None:
    graph = onnx.load(learned[1].require("export") / "model.onnx", load_external_data=False).graph
    types = {item.name: item.data_type for item in graph.initializer}
    stored = [name for name, kind in types.items() if kind == onnx.TensorProto.INT4]
    assert len([name for name in stored if name.endswith(".W")]) >= 8  # q, k and v share a node


def test_the_learned_file_computes_what_torch_computes(learned: tuple[Path, Any, str]) -> None:
    model, work, _ = learned
    source = resolve(ModelSection(id=str(model)))
    folded = fold.Artifact(work.require("fold"))
    with open_folded(source, ModelSection(id=str(model)), folded) as session:
        expected = session.prefill(IDS[:, :12])
    made = onnx_logits(work.require("export") / "model.onnx", IDS[:, :12], MASK[:, :12], prefill=12)
    assert np.abs(made - expected).max() <= 1e-4 * expected.std()


def test_the_dense_file_beside_it_is_the_checkpoint(learned: tuple[Path, Any, str]) -> None:
    """It shares the sparse one's integers, where an MLP's lie in the order of its last linear."""
    model, work, _ = learned
    file = work.require("export") / "dense" / "stored" / "model.onnx"
    made = onnx_logits(file, IDS, MASK, prefill=12)
    expected = reference(model)
    assert np.abs(made - expected).max() <= 1e-4 * expected.std()


def test_a_dense_prompt_is_the_checkpoints(tiny_llama: Path, tmp_path: Path) -> None:
    """Learned constants go around the integers, for decoded tokens alone."""
    model = SAVED["gptq"](tiny_llama, tmp_path / "model")
    method = {**EVERYTHING, "phases": "decode", "mitigations": ("l-pts", "ls", "bias")}
    work, _ = build(model, tmp_path / "work", **method)
    section = ModelSection(id=str(model))
    folded = fold.Artifact(work.require("fold"))
    assert {"value_scale", "bias", "shift"} <= folded.tensors(folded.layers[0].name).keys()
    prompt, whole = IDS[:, :9], reference(model)
    with open_folded(resolve(section), section, folded) as session:
        made = session.prefill(prompt)
        decoded = session.decode_step(IDS[:, 9:10])
    assert np.abs(made - whole[:, 9 - made.shape[1] : 9]).max() <= 1e-4 * whole.std()
    assert np.abs(decoded - whole[:, 9]).max() > 1e-2 * whole.std()
    file = work.require("export") / "model.onnx"
    exported = onnx_logits(file, IDS[:, :10], MASK[:, :10], prefill=9)
    assert np.abs(exported[:, :9] - whole[:, :9]).max() <= 1e-4 * whole.std()
    assert np.abs(exported[:, 9] - decoded).max() <= 1e-4 * whole.std()


def test_a_remainder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = SAVED["awq"](tiny_llama, tmp_path / "model")
    with pytest.raises(RecipeError, match="r-sparse takes a part out of the weights"):
        build(model, tmp_path / "work", last="fold", mitigations=("r-sparse",))
    assert not (tmp_path / "work" / "fold" / "current").exists()


@pytest.mark.parametrize(
    ("machine", "keeps"),
    [
        (("onnxruntime", "cpu", "float32"), True),
        (("onnxruntime", "gpu", "float16"), True),
        (("onnxruntime", "gpu", "float32"), False),
        (("tensorrt", "cpu", "float16"), False),
    ],
)
def test_integers_are_kept_where_kernels_take_them(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: tuple[Target, str, Dtype],
    keeps: bool,
) -> None:
    target, device, dtype = machine
    monkeypatch.setattr(storing, "gpu_runs", lambda _: device == "gpu")
    section = ModelSection(id=str(SAVED["awq"](tiny_llama, tmp_path / "model")), dtype=dtype)
    inputs = SimpleNamespace(
        recipe=Recipe(model=section, target=target), source=resolve(section), environment=probe()
    )
    assert (storing.imported(inputs) is not None) is keeps
    assert storing.rounds_activations(inputs) is (machine[:2] == ("onnxruntime", "cpu"))
