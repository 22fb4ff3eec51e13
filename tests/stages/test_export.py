"""The export stage: what it writes, that it writes the same twice, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from nmexport.environment import probe
from nmexport.errors import ArtifactError, EnvironmentFault, ModelError, RecipeError
from nmexport.graph import checks
from nmexport.graph.linears import linears_of_node
from nmexport.models.source import resolve
from nmexport.models.swap import replace_linears
from nmexport.models.tracing import cache_shapes
from nmexport.progress import Silent
from nmexport.recipe import (
    CorpusSection,
    EvaluationSection,
    GatesSection,
    LatencySection,
    ModelSection,
    Recipe,
)
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.remainder import remainder_of
from nmexport.stages import export, exporting, verify
from nmexport.stages.inputs import StageInputs
from nmexport.store.layers import Layers, write_layers
from nmexport.store.tensors import ShardedWriter

from tests.support.exported import (
    PATTERN,
    export_folder,
    linears_of,
    load,
    onnx_logits,
    specs_of,
    torch_logits,
)
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nmexport.stages.exporting import TracedModel

BIASED = Constants(
    score_scale=torch.linspace(0.5, 2.0, 64),
    channel_order=torch.arange(64, dtype=torch.int32).reshape(4, 16).t().reshape(-1),
    shift=torch.full((1,), 0.1),
)

DYNAMIC = Behaviour(pattern=PATTERN, dynamic_shift=True, variance_correction=True)


def constants_for(linear: torch.nn.Linear) -> Constants:
    """Every kind of constant on the linears that read the hidden state, none on the others."""
    return BIASED if linear.in_features == 64 else Constants()


def write_fold(source: Path, folder: Path) -> None:
    """What the fold stage leaves, with two different signatures of the op."""
    model = load(source)
    behaviour = Behaviour(pattern=PATTERN)
    with ShardedWriter(folder) as writer:
        for name, linear in linears_of(model).items():
            folded = fold(linear, behaviour, constants_for(linear), dtype=torch.float32)
            # Clones: safetensors stores no two names of one memory.
            writer.add({f"{name}.{kind}": tensor.clone() for kind, tensor in folded.items()})
    write_layers(folder, Layers(layers=tuple(specs_of(model, behaviour))))


def stage_inputs(source: Path, folded: Path, output: Path) -> StageInputs:
    section = ModelSection(id=str(source))
    output.mkdir()
    return StageInputs(
        recipe=Recipe(  # lengths within the tiny model's context
            model=section,
            calibration=CorpusSection(length=64),
            evaluation=EvaluationSection(length=64, generate_tokens=8),
            latency=LatencySection(prefill_tokens=16, decode_context=16),
        ),
        source=resolve(section),
        environment=probe(),
        progress=Silent(),
        output=output,
        upstream={"fold": folded},
    )


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The stage run once on a model folder with `metrics`."""
    root = tmp_path_factory.mktemp("export")
    (root / "fold").mkdir()
    write_fold(tiny_llama, root / "fold")
    inputs = stage_inputs(tiny_llama, root / "fold", root / "first")
    return SimpleNamespace(root=root, metrics=export.run(inputs), inputs=inputs)


def test_files(run: SimpleNamespace) -> None:
    names = set(digests(run.root / "first"))
    assert names >= {
        "model.onnx",
        "model.onnx.data",
        "dense/model.onnx",
        "dense/model.onnx.data",
        "config.json",
        "generation_config.json",
        "genai_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert run.metrics["sparse_linears"] == 14
    assert run.metrics["nodes"] < run.metrics["traced_nodes"] / 4


def test_without_the_baseline_only_the_sparse_model_is_written(
    run: SimpleNamespace, tmp_path: Path
) -> None:
    section = run.inputs.recipe.model.model_copy(update={"dense_baseline": False})
    recipe = run.inputs.recipe.model_copy(update={"model": section})
    (tmp_path / "alone").mkdir()
    inputs = replace(run.inputs, recipe=recipe, output=tmp_path / "alone")
    export.run(inputs)
    alone, both = digests(tmp_path / "alone"), digests(run.root / "first")
    assert alone == {name: digest for name, digest in both.items() if not name.startswith("dense/")}
    assert export.key_fields(inputs) != export.key_fields(run.inputs)
    verify.key_fields(inputs)
    gates = recipe.model_copy(update={"gates": GatesSection(min_decode_speedup=1.0)})
    with pytest.raises(RecipeError, match="nothing to hold min-decode-speedup against"):
        verify.key_fields(replace(inputs, recipe=gates))


def test_a_full_disk_is_refused_before_anything_is_written(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    inputs = replace(run.inputs, output=tmp_path)
    with pytest.raises(EnvironmentFault, match="no-dense-baseline"):
        export.run(inputs)
    assert not list(tmp_path.iterdir())


def test_same_bytes_twice_and_from_another_place(
    run: SimpleNamespace, tiny_llama: Path, tmp_path: Path
) -> None:
    """No path, time, address or counter of the process gets into a file."""
    elsewhere = shutil.copytree(tiny_llama, tmp_path / "moved")
    inputs = stage_inputs(elsewhere, run.root / "fold", tmp_path / "second")
    export.run(inputs)
    assert digests(tmp_path / "second") == digests(run.root / "first")
    for path in (tmp_path / "second").rglob("*.onnx"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert b".py" not in path.read_bytes()


def test_key_fields_are_json_and_name_the_model(run: SimpleNamespace) -> None:
    fields = json.loads(json.dumps(export.key_fields(run.inputs)))
    assert fields["model"] == run.inputs.source.digest
    assert fields["dtype"] == "float32"
    assert fields["writers"]["torch"]


def test_artifact(run: SimpleNamespace, tmp_path: Path) -> None:
    artifact = export.Artifact(run.root / "first")
    assert artifact.model.name == "model.onnx"
    assert artifact.dense_model.parent.name == "dense"
    with pytest.raises(ArtifactError, match="lacks"):
        _ = export.Artifact(tmp_path).model


def test_all_constants_arrive(run: SimpleNamespace) -> None:
    """Shifts, scales and orders change the result, and it is torch's."""
    model = load(run.inputs.source.folder)
    behaviour = Behaviour(pattern=PATTERN)
    stand_ins = {
        name: SparseLinear(
            behaviour, fold(linear, behaviour, constants_for(linear), dtype=torch.float32)
        )
        for name, linear in linears_of(model).items()
    }
    replace_linears(model, stand_ins)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (1, 12))
    mask = np.ones_like(ids)
    actual = onnx_logits(run.root / "first" / "model.onnx", ids, mask, prefill=8)
    np.testing.assert_allclose(actual, torch_logits(model, ids, mask), rtol=1e-3, atol=1e-3)


def test_nodes_carry_their_layer(run: SimpleNamespace) -> None:
    model = onnx.load(run.root / "first" / "model.onnx", load_external_data=False)
    names = {item.name for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "NMLinear"]
    assert [node.name.rpartition(".")[2] for node in nodes[:4]] == [
        "q_proj+k_proj+v_proj",
        "o_proj",
        "gate_proj+up_proj",
        "down_proj",
    ]
    linears = [name for node in nodes for name in linears_of_node(node)]
    assert linears == list(linears_of(load(run.inputs.source.folder)))
    assert all(node.input[1] == f"{node.name}.W" for node in nodes)
    assert not names & {f"{name}.weight" for name in linears}
    assert len({node.overload for node in nodes}) == len(model.functions) == 2


def fold_each(
    traced: TracedModel, output: Path, change: Callable[[str], Constants]
) -> onnx.ModelProto:
    """Export with constants of every linear's own."""
    behaviour = Behaviour(pattern=PATTERN)
    folded = {
        name: fold(linear, behaviour, change(name), dtype=torch.float32)
        for name, linear in linears_of(traced.model).items()
    }
    exporting.write_models(traced, specs_of(traced.model, behaviour), folded.__getitem__, output)
    return onnx.load(output / "model.onnx", load_external_data=False)


def test_only_linears_that_select_alike_are_fused(
    traced_llama: TracedModel, tmp_path: Path
) -> None:
    """v scores channels otherwise than q and k, so it stays alone; the result is still torch's."""

    def constants(name: str) -> Constants:
        return BIASED if name.endswith("v_proj") else Constants()

    model = fold_each(traced_llama, tmp_path, constants)
    names = [node.name.rpartition(".")[2] for node in model.graph.node if node.domain]
    assert names[:3] == ["q_proj+k_proj", "v_proj", "o_proj"]
    checks.check_sparse(
        tmp_path / "model.onnx",
        {spec.name: spec for spec in specs_of(traced_llama.model, Behaviour(pattern=PATTERN))},
    )


def test_a_bias_that_only_some_fused_linears_have(
    traced_llama: TracedModel, tmp_path: Path
) -> None:
    bias_of_k = {"bias": torch.full((32,), 3.0)}
    model = traced_llama.model
    behaviour = Behaviour(pattern=PATTERN)
    folded = {
        name: fold(linear, behaviour, Constants(), dtype=torch.float32)
        | (bias_of_k if name.endswith("k_proj") else {})
        for name, linear in linears_of(model).items()
    }
    exporting.write_models(traced_llama, specs_of(model, behaviour), folded.__getitem__, tmp_path)
    exported = onnx.load(tmp_path / "model.onnx")
    bias = next(
        onnx.numpy_helper.to_array(item)
        for item in exported.graph.initializer
        if item.name == "model.layers.1.self_attn.q_proj+k_proj+v_proj.bias"
    )
    np.testing.assert_array_equal(bias, [0.0] * 64 + [3.0] * 32 + [0.0] * 32)


def test_linears_with_value_scales_of_their_own_are_not_fused(
    tiny_llama: Path, traced_llama: TracedModel, tmp_path: Path
) -> None:
    """One node has one value scale: q and k share theirs, v has another."""
    model = load(tiny_llama)
    behaviour = Behaviour(pattern=PATTERN)

    def folded(name: str, linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
        tensors = fold(linear, behaviour, constants_for(linear), dtype=torch.float32)
        if name.endswith(("q_proj", "k_proj")):
            tensors["value_scale"] = torch.linspace(0.5, 1.5, linear.in_features)
        elif name.endswith("v_proj"):
            tensors["value_scale"] = torch.linspace(1.5, 0.5, linear.in_features)
        return tensors

    tensors = {name: folded(name, linear) for name, linear in linears_of(model).items()}
    exporting.write_models(traced_llama, specs_of(model, behaviour), tensors.__getitem__, tmp_path)
    exported = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    names = [node.name.rpartition(".")[2] for node in exported.graph.node if node.domain]
    assert names[:3] == ["q_proj+k_proj", "v_proj", "o_proj"]
    replace_linears(model, {name: SparseLinear(behaviour, one) for name, one in tensors.items()})
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (1, 12))
    mask = np.ones_like(ids)
    actual = onnx_logits(tmp_path / "model.onnx", ids, mask, prefill=8)
    np.testing.assert_allclose(actual, torch_logits(model, ids, mask), rtol=1e-3, atol=1e-3)


def test_genai_config(run: SimpleNamespace) -> None:
    document = json.loads((run.root / "first" / "genai_config.json").read_text())
    decoder = document["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 2)
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"
    assert document["model"]["type"] == "llama"
    assert document["model"]["vocab_size"] == VOCABULARY


def exported_with(source: Path, tmp_path: Path, behaviour: Behaviour, traced: TracedModel) -> float:
    """Largest difference between torch and ONNX under a behaviour."""
    exported = export_folder(source, tmp_path, behaviour=behaviour, traced=traced)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, (2, 10))
    mask = np.ones_like(ids)
    actual = onnx_logits(exported.model, ids, mask, prefill=9)
    sparse = torch_logits(exported.sparse, ids[:, :9], mask[:, :9])
    return float(np.abs(actual[:, :9] - sparse).max())


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(pattern=PATTERN, dynamic_shift=True, variance_correction=True),
        pytest.param(Behaviour(pattern=PATTERN, phase="decode"), marks=pytest.mark.slow),
        pytest.param(Behaviour(pattern=PATTERN, phase="prefill"), marks=pytest.mark.slow),
    ],
    ids=lambda behaviour: f"{behaviour.phase}-{behaviour.dynamic_shift}",
)
def test_behaviours(
    tiny_llama: Path, traced_llama: TracedModel, tmp_path: Path, behaviour: Behaviour
) -> None:
    assert exported_with(tiny_llama, tmp_path, behaviour, traced_llama) < 1e-3


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_types_pass_the_checks(tiny_llama: Path, tmp_path: Path, dtype: str) -> None:
    exported = export_folder(tiny_llama, tmp_path, dtype=dtype)
    model = onnx.load(exported.model, load_external_data=False)
    weight = next(item for item in model.graph.initializer if item.name.endswith("v_proj.W"))
    assert onnx.TensorProto.DataType.Name(weight.data_type) == dtype.upper()
    assert model.graph.output[0].type.tensor_type.elem_type == weight.data_type


@pytest.mark.slow
def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    source, output = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    save_tiny_model(source, "llama", tie_word_embeddings=True, vocab_size=400)
    exported = export_folder(source, output)
    model = onnx.load(exported.model, load_external_data=False)
    sizes = [tuple(item.dims) for item in model.graph.initializer]
    assert sizes.count((400, 64)) == 1
    assert (64, 400) not in sizes
    ids = np.random.default_rng(3).integers(3, VOCABULARY, (1, 6))
    actual = onnx_logits(exported.dense_model, ids, np.ones_like(ids), prefill=6)
    assert actual.shape[-1] == 400  # the tokenizer has fewer entries than the model
    expected = torch_logits(exported.dense, ids, np.ones_like(ids))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def mamba(folder: Path) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    return MambaForCausalLM(config).eval()


def test_model_without_a_key_value_cache(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'mamba' cannot be exported") as caught:
        exporting.trace_model(mamba(tmp_path), [])
    assert "llama" in str(caught.value), "says what can be exported"


def test_model_that_ignores_the_cache(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.forward = lambda **_: None
    with pytest.raises(ModelError, match=r"'llama' cannot be exported: it keeps no cache"):
        exporting.trace_model(model, [])


def test_model_that_cannot_be_traced(tiny_llama: Path) -> None:
    """What goes wrong inside the tracer names the model type, and the model is as before."""
    model = load(tiny_llama)
    shapes = cache_shapes(model)
    layer = model.model.layers[0].mlp
    forward = layer.forward

    def data_dependent(x: torch.Tensor) -> torch.Tensor:
        return forward(x) if float(x.sum()) > 0 else forward(x) * 2

    layer.forward = data_dependent
    attention = model.config._attn_implementation
    with pytest.raises(ModelError, match=r"'llama' cannot be exported"):
        exporting.trace_model(model, list(linears_of(model)))
    assert model.config._attn_implementation == attention
    assert all(isinstance(module, torch.nn.Linear) for module in linears_of(model).values())
    assert cache_shapes(model) == shapes


def test_a_model_whose_table_of_masks_ends_with_its_context(tmp_path: Path) -> None:
    """GPT-Neo is traced up to its context, and right to the last token of it."""
    source, output = tmp_path / "source", tmp_path / "export"
    output.mkdir()
    save_tiny_model(source, "gpt_neo", max_position_embeddings=64)
    exported = export_folder(source, output)
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (2, 64))
    for length in (12, 64):
        part = ids[:, :length]
        actual = onnx_logits(exported.dense_model, part, np.ones_like(part), prefill=9)
        wanted = torch_logits(load(source), part, np.ones_like(part))
        np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("behaviour", [Behaviour(pattern=PATTERN), DYNAMIC], ids=["plain", "d-pts"])
def test_a_remainder_is_exported_beside_the_op(
    tiny_llama: Path, traced_llama: TracedModel, tmp_path: Path, behaviour: Behaviour
) -> None:
    def constants(linear: torch.nn.Linear) -> Constants:
        fixed = None if behaviour.dynamic_shift else torch.full((1,), 0.1)
        return Constants(shift=fixed, remainder=remainder_of(linear.weight, 8))

    exported = export_folder(
        tiny_llama, tmp_path, behaviour=behaviour, constants=constants, traced=traced_llama
    )
    ids = np.random.default_rng(2).integers(3, VOCABULARY, (2, 10))
    mask = np.ones_like(ids)
    actual = onnx_logits(exported.model, ids, mask, prefill=9)
    sparse = torch_logits(exported.sparse, ids, mask)
    assert np.abs(actual - sparse).max() < 1e-3
    ops = [node.op_type for node in onnx.load(exported.model, load_external_data=False).graph.node]
    assert ops.count("NMLinear") == 8  # q/k/v and gate/up fused all the same
