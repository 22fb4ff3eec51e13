"""Engines by the real TensorRT-RTX builder, without a GPU; what it refuses; the audit.

The plugin here is the real adapter on kernels that only take notes: the builder cannot tell.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nmexport.environment import probe
from nmexport.errors import ArtifactError, EnvironmentFault, InternalError, RecipeError
from nmexport.graph.contract import op_contract
from nmexport.graph.tensorrt import PLUGIN_VERSION, for_tensorrt
from nmexport.models.source import ModelSource
from nmexport.progress import Silent
from nmexport.recipe import EngineSection, EvaluationSection, LatencySection, ModelSection, Recipe
from nmexport.runtimes import opening
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.tensorrt import (
    build_progress,
    building,
    layer_audit,
    pair,
    requirements,
    weight_copies,
)
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt.building import NetworkLayer, Order
from nmexport.runtimes.tensorrt.profiles import Limits, Profile, limits_from, profiles_for
from nmexport.selection import Selection
from nmexport.serving import triton_config
from nmexport.stages import engine
from nmexport.stages.inputs import StageInputs
from onnx import TensorProto, helper, numpy_helper

from tests.support.exported import export_folder
from tests.support.pipelines import pipeline_in
from tests.support.tiny import FAMILIES, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = Recipe(
    model=ModelSection(id="tiny", dtype="float16"),
    target="tensorrt-rtx",
    evaluation=EvaluationSection(length=32, generate_tokens=8),
    latency=LatencySection(prefill_tokens=16, decode_context=16),
    engine=EngineSection(compute_capabilities=("8.9",), max_batch=2, max_context=64),
)


@pytest.fixture(scope="session")
def half_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half-llama")
    return export_folder(tiny_llama, folder, dtype="float16").folder


def stage_inputs(tmp_path: Path, export: Path, recipe: Recipe = RECIPE) -> StageInputs:
    output = tmp_path / "engine" / "0123456789ab.partial-1"
    output.mkdir(parents=True)
    source = ModelSource(id="tiny", revision=None, folder=tmp_path, gguf_file=None, digest="0" * 64)
    return StageInputs(
        recipe=recipe,
        source=source,
        environment=probe(),
        progress=Silent(),
        output=output,
        upstream={"export": export},
    )


def order_of(model: onnx.ModelProto, folder: Path, plugin: Path | None, **changes: Any) -> Order:
    shapes = {
        value.name: tuple((1, tokens, 32) for tokens in (1, 4, 8)) for value in model.graph.input
    }
    order = Order(
        target="tensorrt-rtx",
        model=model.SerializeToString(),
        weights_beside=folder / "model.onnx",
        profiles=[Profile(name="all", shapes=shapes)],
        compute_capabilities=("8.9",),
        plugin=plugin,
    )
    return replace(order, **changes)


def linear(
    *, w: np.ndarray | None = None, inputs: tuple[str, ...] = ("x", "W"), **attributes: Any
) -> onnx.ModelProto:
    """One NMLinear of 32 channels in float16."""
    w = np.ones((32, 16), np.float16) if w is None else w
    contract = op_contract()
    # The parser looks for a creator of version 1 unless a node names another.
    given = {"n": 8, "m": 16, PLUGIN_VERSION: contract.plugin_version, **attributes}
    node = helper.make_node("NMLinear", inputs, ["y"], name="block.3", domain="nmexport", **given)
    tensor, half = helper.make_tensor_value_info, TensorProto.FLOAT16
    graph = helper.make_graph(
        [node],
        "g",
        [tensor("x", half, ["B", "S", 32])],
        [tensor("y", half, ["B", "S", 16])],
        [numpy_helper.from_array(w, "W")],
    )
    opsets = {"": 23, contract.domain: contract.opset_version}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


# -- the stage --------------------------------------------------------------------------------


def test_the_stage_builds_both_engines_and_says_what_they_are(
    tmp_path: Path, half_llama: Path, plugin: Path
) -> None:
    inputs = stage_inputs(tmp_path, half_llama)
    metrics = engine.run(inputs)
    for name in ("model.plan", "dense.plan", "layers.json", "build.log", "engine.json"):
        assert (inputs.output / name).stat().st_size > 0
    nodes = pair.sparse_nodes(for_tensorrt(half_llama / "model.onnx", capacity=64).model)
    assert metrics["plugin_layers"] == {"0": len(nodes), "1": len(nodes)}
    assert (metrics["attention"], metrics["cache"]) == ("fused", "in place")
    layers = json.loads((inputs.output / "layers.json").read_text())
    assert layers["source"] == "plan"
    assert (layers["attention_layers"], layers["cache_updates"]) == (2, 4)
    assert sum(layers["attention_kernels"].values()) == 2 * 2  # in both profiles
    assert layers["weights_found"] >= len(nodes)
    log = (inputs.output / "build.log").read_text()
    assert "[engine: sparse] INFO: " in log
    assert "[engine: dense] INFO: " in log
    record = json.loads((inputs.output / "engine.json").read_text())["build"]
    assert record["timing_cache"] is None
    assert "times nothing" in record["why_no_timing_cache"]
    assert record["attention_layers"] == 2
    described = read_engine(inputs.output).tensorrt
    assert described is not None
    assert described.target == "tensorrt-rtx"
    assert described.compute_capabilities == ("8.9",)
    assert described.profiles == ("prefill", "decode")
    assert described.plugin.sha256
    # The same description still says how the ONNX file runs elsewhere.
    why = opening.why_not_here(inputs.output)
    assert why is not None
    with pytest.raises(EnvironmentFault):
        opening.open_session(inputs.output)
    assert read_engine(inputs.output).runtime == "tensorrt-rtx"


def test_an_engine_for_triton_keeps_the_exports_signature(
    tmp_path: Path, half_llama: Path, plugin: Path
) -> None:
    section = RECIPE.engine.model_copy(update={"in_place_cache": "off"})
    inputs = stage_inputs(tmp_path, half_llama, RECIPE.model_copy(update={"engine": section}))
    metrics = engine.run(inputs)
    assert (metrics["cache"], metrics["why_not_in_place"]) == ("concatenated", "not asked for")
    described = read_engine(inputs.output).tensorrt
    assert described is not None
    assert triton_config.signature_of_engine(described) == triton_config.signature_of(
        half_llama / "model.onnx"
    )


def test_what_decides_an_engine_is_in_its_key(
    tmp_path: Path, half_llama: Path, plugin: Path
) -> None:
    inputs = stage_inputs(tmp_path, half_llama)
    key = engine.key_fields(inputs)
    assert key["plugin"]["sha256"]
    assert key["tensorrt-rtx"]
    other = RECIPE.model_copy(update={"engine": EngineSection(compute_capabilities=("8.0",))})
    assert engine.key_fields(replace(inputs, recipe=other)) != key


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_family_builds(tmp_path: Path, plugin: Path, family: str, dtype: str) -> None:
    save_tiny_model(tmp_path / "model", family)
    export = tmp_path / "export"
    export.mkdir()
    export_folder(tmp_path / "model", export, dtype=dtype)
    model = ModelSection(id="tiny", dtype=dtype)  # type: ignore[arg-type]
    recipe = RECIPE.model_copy(update={"model": model})
    metrics = engine.run(stage_inputs(tmp_path, export, recipe))
    assert metrics["cache"] == "in place"
    assert metrics["plugin_layers"]["0"] == metrics["plugin_layers"]["1"] > 0


def test_the_plugin_travels_inside_the_plan(tmp_path: Path, plugin: Path) -> None:
    order = order_of(linear(), tmp_path, plugin)
    bare, carrying = (
        building.build(replace(order, embed_plugin=embedded), Silent()).data
        for embedded in (False, True)
    )
    library = plugin.read_bytes()
    assert library[:4096] in carrying
    assert library[:4096] not in bare


def test_one_plan_for_several_gpus(tmp_path: Path, plugin: Path) -> None:
    order = order_of(linear(), tmp_path, plugin, compute_capabilities=("8.0", "12.0"))
    plan = building.build(order, Silent())
    assert layer_audit.planned_plugin_layers(plan.data)


def test_the_librarys_description_has_what_readers_expect(recording_plugin: Path) -> None:
    described = tensorrt_library.describe_plugin(recording_plugin)
    keys = {"version", "tensorrt_headers", "cuda", "architectures", "plugin_version"}
    assert set(described) == keys
    assert described["plugin_version"] == "2"


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (linear(n=0), r'NMLinear "block.3": field n is 0; allowed: an integer from 1 to 64'),
        (linear(m=24), r'"block.3": input X has 32 channels.*a positive multiple of field m, 24'),
        (linear(phase="sometimes"), r'"block.3": field phase is "sometimes"; allowed: .*decode'),
        (linear(w=np.ones((32, 16), np.float32)), r"input W is float32; allowed: float16"),
        (linear(w=np.ones((16, 32), np.float16)), r"input W has shape \[16, 32\]; allowed: \[K, O"),
        (linear(dynamic_shift=1), r"dynamic_shift is 1 and input shift_weight is missing"),
        (linear(present_inputs="X,weights"), r'present_inputs is "X,weights".*"weights" does not'),
    ],
)
def test_a_wrong_node_is_named_with_field_value_and_what_is_allowed(
    tmp_path: Path, plugin: Path, model: onnx.ModelProto, said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        building.build(order_of(model, tmp_path, plugin), Silent())
    # The process lives on, and builds the next one.
    assert building.build(order_of(linear(), tmp_path, plugin), Silent()).data


@pytest.mark.parametrize("ask", [requirements.check_gpus, requirements.check])
@pytest.mark.parametrize(
    ("target", "capabilities", "said"),
    [
        ("tensorrt-rtx", ("8.9", "9.0"), r"compute capability 9\.0\.\nAllowed: 8\.0, 8\.6"),
        ("tensorrt", ("8.9",), r"for the GPU it runs on, not for 8\.9"),
        ("tensorrt-rtx", (), r"No GPU is here(.|\n)*--compute-capability 8\.9"),
    ],
)
def test_gpus_that_a_target_does_not_build_for_are_refused(
    ask: Any,
    target: Any,
    capabilities: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorrt_library, "load", lambda _: None)
    monkeypatch.setattr(tensorrt_library, "gpu_is_usable", lambda: False)
    with pytest.raises((RecipeError, EnvironmentFault), match=said):
        ask(target, capabilities)


def test_the_gpu_here_must_be_one_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "gpu_is_usable", lambda: True)
    monkeypatch.setattr(tensorrt_library, "compute_capability", lambda: "9.0")
    with pytest.raises(EnvironmentFault, match=r"compute capability 9\.0(.|\n)*--target tensorrt"):
        requirements.check_gpus("tensorrt-rtx", ())
    requirements.check_gpus("tensorrt", ())


def test_what_is_missing_is_said_before_anything_runs(
    tmp_path: Path, half_llama: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = stage_inputs(tmp_path, half_llama)
    monkeypatch.setattr(requirements, "find_spec", lambda _: None)
    with pytest.raises(EnvironmentFault, match="pip install polygraphy"):
        engine.key_fields(inputs)
    monkeypatch.undo()
    monkeypatch.setattr(tensorrt_library, "_FOLDER", tmp_path)
    with pytest.raises(EnvironmentFault, match=r"tensorrt/build\.py"):
        engine.key_fields(inputs)


def test_a_plan_of_what_would_run_says_it_too(
    tmp_path: Path, tiny_llama: Path, plugin: Path
) -> None:
    section = EngineSection(compute_capabilities=("9.0",))
    source = ModelSource(
        id="tiny", revision=None, folder=tiny_llama, gguf_file=None, digest="1" * 64
    )
    pipeline = pipeline_in(tmp_path / "w", RECIPE.model_copy(update={"engine": section}), source)
    with pytest.raises(RecipeError, match="does not run on compute capability 9"):
        pipeline.plan(Selection(last="engine"))
    assert not (tmp_path / "w").exists()


def test_without_the_operator_the_cache_is_copied(
    half_llama: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 10.14 parses attention, and no cache update."""
    monkeypatch.setattr(building, "parser_takes", lambda _, op: op != "TensorScatter")
    for side in pair._sides("tensorrt-rtx", RECIPE, half_llama, limits_from(RECIPE)):
        assert not side.rewritten.in_place
        why = str(side.rewritten.why_not_in_place)
        assert re.fullmatch(r"the ONNX parser of tensorrt-rtx \S+ has no TensorScatter", why)
        assert not any(node.op_type == "TensorScatter" for node in side.rewritten.model.graph)


def test_without_attention_the_version_to_install_is_said(
    half_llama: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "parser_takes", lambda *_: False)
    with pytest.raises(EnvironmentFault, match=r"2 Attention nodes(.|\n)*10\.14 or later"):
        pair._sides("tensorrt-rtx", RECIPE, half_llama, limits_from(RECIPE))


def test_the_parser_is_asked_what_it_knows(plugin: Path) -> None:
    known = {
        op: building.parser_takes("tensorrt-rtx", op) for op in ("Attention", "TensorScatter", "No")
    }
    assert known == {"Attention": True, "TensorScatter": True, "No": False}


def test_both_engines_have_one_kind_of_cache(
    half_llama: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One session reads both by one description."""

    def only_sparse(path: Path, *, capacity: int | None, why_no_capacity: str = "") -> Any:
        if path.parent.name == "dense" and capacity is not None:
            return for_tensorrt(path, capacity=None, why_no_capacity="a dense reason")
        return for_tensorrt(path, capacity=capacity, why_no_capacity=why_no_capacity)

    monkeypatch.setattr(pair, "for_tensorrt", only_sparse)
    sides = pair._sides("tensorrt-rtx", RECIPE, half_llama, limits_from(RECIPE))
    found = {(side.rewritten.in_place, side.rewritten.why_not_in_place) for side in sides}
    assert found == {(False, "a dense reason")}


def test_an_update_that_is_not_in_place_is_noticed(half_llama: Path) -> None:
    rewritten = for_tensorrt(half_llama / "model.onnx", capacity=64)
    side = pair._Side(half_llama, "model.plan", "engine: sparse", rewritten)
    plan = building.Plan(data=b"", layers=(), tensors=(), parse_seconds=0, build_seconds=0)
    with pytest.raises(InternalError, match="0 in-place cache updates where the graph has 4"):
        pair._check_cache(side, plan)


def test_a_failed_build_leaves_its_log(
    tmp_path: Path, half_llama: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, **options: Any) -> Any:
        rewritten = for_tensorrt(path, **options)
        for node in rewritten.model.graph:
            if node.op_type == "NMLinear":
                node.attributes["n"] = ir.AttrInt64("n", 0)
        return rewritten

    monkeypatch.setattr(pair, "for_tensorrt", broken)
    inputs = replace(stage_inputs(tmp_path, half_llama), resume=tmp_path / "kept")
    with pytest.raises(ArtifactError, match="field n is 0") as refused:
        engine.run(inputs)
    log = tmp_path / "kept" / "build.log"
    assert f"the whole log is in {log}" in str(refused.value)
    assert "field n is 0" in log.read_text()
    monkeypatch.undo()
    monkeypatch.setattr(tensorrt_library, "_FOLDER", plugin.parent)
    engine.run(inputs)  # a later one that succeeds takes its own log with it
    assert not log.exists()
    assert "field n is 0" not in (inputs.output / "build.log").read_text()


def test_without_the_link_the_parser_is_not_tried(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_library, "_is_loaded", lambda _: False)
    monkeypatch.setattr(tensorrt_library, "NAME_LIBRARY", "libmissing.so")
    with pytest.raises(EnvironmentFault, match=r"libmissing\.so.*\n.*\n.*tensorrt/build\.py"):
        building.build(order_of(linear(), tmp_path, plugin), Silent())


def test_a_plugin_of_another_version_is_refused(
    tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_library, "__version__", "7.7.7")
    with pytest.raises(EnvironmentFault, match=r"is version .*\nAllowed: 7\.7\.7"):
        building.build(order_of(linear(), tmp_path, plugin), Silent())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt_library._MODULES, "tensorrt", "nmexport_no_such_module")
    with pytest.raises(EnvironmentFault, match="pip install tensorrt"):
        tensorrt_library.load("tensorrt")


def test_an_old_package_is_refused(recording_plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt_library._OLDEST, "tensorrt-rtx", "99.0")
    with pytest.raises(EnvironmentFault, match=r"99\.0 or later"):
        tensorrt_library.load("tensorrt-rtx")


def test_an_interrupt_stops_the_builder(tmp_path: Path, plugin: Path) -> None:
    class Interrupting(Silent):
        def track(self, items: Any, *, label: str, total: int | None = None) -> Any:
            for _ in items:
                raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        building.build(order_of(linear(), tmp_path, plugin), Interrupting())
    assert building.build(order_of(linear(), tmp_path, plugin), Silent()).data


# -- profiles, audit, description --------------------------------------------------------------


def test_profiles_cover_what_the_recipe_measures() -> None:
    limits = limits_from(Recipe(model=ModelSection(id="m")))
    assert limits.max_sequence == 512
    assert limits.max_context >= 512
    assert limits.max_context % 64 == 0
    assert limits.best_sequence == 128
    axes = {
        "input_ids": ("batch_size", "sequence_length"),
        "past": ("batch_size", 2, "past_sequence_length", 16),
        "mask": ("batch_size", "total_sequence_length"),
    }
    sizes = Limits(max_batch=4, max_sequence=8, max_context=20, best_sequence=5, best_context=9)
    prefill, decode = profiles_for(axes, sizes)
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 5), (4, 8))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert decode.shapes["past"] == ((1, 2, 0, 16), (1, 2, 9, 16), (4, 2, 19, 16))
    assert decode.shapes["mask"] == ((1, 1), (1, 10), (4, 20))


def test_a_run_longer_than_the_context_is_refused() -> None:
    section = EngineSection(max_context=64, max_sequence=128)
    with pytest.raises(RecipeError, match="at most 64"):
        limits_from(Recipe(model=ModelSection(id="m"), engine=section))


def layers(*names: str) -> list[NetworkLayer]:
    return [NetworkLayer(name=name, kind="PLUGIN_V3") for name in names]


def weight(name: str, *, size: int = 1000) -> weight_copies.Weight:
    """A weight, with a sample of its own."""
    sample = np.random.default_rng(list(name.encode())).bytes(64)
    return weight_copies.Weight(name=name, size=size, sample=sample)


def sample_of(name: str) -> bytes:
    sample = weight(name).sample
    assert sample is not None
    return sample


def audited(**changes: Any) -> layer_audit.LayerAudit:
    given: dict[str, Any] = {
        "network": layers("a", "b"),
        "plan": b'custom_layer={ name="a" } custom_layer={ name="b" }',
        "inspector": None,
        "nodes": ["a", "b"],
        "weights": [weight("W")],
    }
    return layer_audit.audit(**{**given, **changes})


def test_the_audit_hears_the_best_witness_there_is() -> None:
    assert audited().source == "plan"
    assert audited(plan=b"").source == "network"
    assert "no execution graph" in str(audited(plan=b"").why)
    told = json.dumps(
        {
            "Layers": [
                {"Name": "a", "LayerType": "PluginV3"},
                {"Name": "b [profile 1]", "LayerType": "PluginV3"},
                {"Name": "b", "LayerType": "PluginV3"},
                {"Name": "a [profile 1]", "LayerType": "PluginV3"},
                {"Name": "other", "LayerType": "kgen"},
            ]
        }
    )
    heard = audited(inspector=told)
    assert (heard.source, heard.why) == ("inspector", None)
    assert heard.plugin_layers == {"0": 2, "1": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": layers("a")}, r"network.*1 plugin layers for 2.*missing b"),
        ({"network": layers("a", "b", "b")}, r"beyond them b"),
        ({"plan": b'custom_layer={ name="a" }'}, r"plan, profile 0.*missing b"),
        ({"plan": bytes(30_000)}, r"30000 bytes for 1000 bytes of weights"),
        ({"plan": sample_of("W") + b"odd" + sample_of("W")}, r"1 weights more than once: W"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_refused(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InternalError, match=said):
        audited(**changes)


def test_what_a_plan_may_hold_beside_weights_grows_with_what_is_in_it() -> None:
    plan = bytes(80_000)
    with pytest.raises(InternalError, match="bytes of weights"):
        audited(plan=plan)
    assert audited(plan=plan, network=[*layers("a", "b"), *other_layers(6)]).plan_bytes == 80_000
    assert audited(plan=plan, profiles=4).plan_bytes == 80_000
    assert audited(plan=plan, plugin_bytes=60_000).plan_bytes == 80_000
    assert audited(plan=plan, compiled=True).plan_bytes == 80_000


def other_layers(count: int) -> list[NetworkLayer]:
    return [NetworkLayer(name=f"other{index}", kind="SHUFFLE") for index in range(count)]


@pytest.mark.parametrize(
    ("kernels", "said"),
    [(4, "fused"), (3, "attention layers"), (0, "attention layers")],
)
def test_attention_is_called_fused_where_every_layer_has_a_kernel(kernels: int, said: str) -> None:
    network = [*layers("a"), *(NetworkLayer(name=x, kind="ATTENTION_INPUT") for x in "cd")]
    plan = b'custom_layer={ name="a" } custom_layer={ name="a [profile 1]" } '
    plan += b"function={ name=_gemm_mha_v2 fqn=x " * kernels
    found = audited(network=network, plan=plan, nodes=["a"])
    assert found.attention == said
    assert found.attention_kernels == ({"gemm_mha_v2": kernels} if kernels else {})
    assert audited(plan=plan, network=layers("a"), nodes=["a"]).attention == "elementary"


def test_the_inspector_names_attention_kernels() -> None:
    names = ("_gemm_mha_v2_myl0_3", "_gemv_mha_v1_myl1_5 [profile 1]", "__myl_Mul")
    records = [{"Name": name, "LayerType": "kgen"} for name in names]
    records += [{"Name": name, "LayerType": "PluginV3"} for name in "ab"]
    found = audited(inspector=json.dumps({"Layers": records}))
    assert found.attention_kernels == {"gemm_mha_v2": 1, "gemv_mha_v1": 1}


@pytest.mark.parametrize("chunk", [1 << 26, 64])
@pytest.mark.parametrize("gap", range(5))
def test_copies_are_found_wherever_they_lie(
    monkeypatch: pytest.MonkeyPatch, chunk: int, gap: int
) -> None:
    monkeypatch.setattr(weight_copies, "_CHUNK", chunk)
    one, two = sample_of("one"), sample_of("two")
    plan = bytes(57 + gap) + one + bytes(gap) + two + bytes(99) + one + one[:40]
    weights = [weight("one"), weight("two"), weight("three"), replace(weight("two"), name="tied")]
    counted = weight_copies.copies(plan, weights)
    assert counted == {"one": 2, "two": 1, "tied": 1, "three": 0}
    assert weight_copies.find_repeated(counted) == ["one"]
    assert weight_copies.copies(b"", weights)["one"] == 0


def test_weights_without_a_face_are_not_looked_for() -> None:
    values = {
        "zeros": np.zeros((64, 64), np.float16),
        "small": np.arange(8, dtype=np.float32),
        "plain": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16),
    }
    graph = ir.Graph(
        [],
        [],
        nodes=[],
        initializers=[
            ir.Value(name=name, const_value=ir.tensor(array)) for name, array in values.items()
        ],
    )
    found = {one.name: one for one in weight_copies.weights_of(ir.Model(graph, ir_version=10))}
    assert {name: one.size for name, one in found.items()} == {
        name: array.nbytes for name, array in values.items()
    }
    assert [name for name, one in found.items() if one.sample] == ["plain"]
    assert (found["plain"].sample or b"none") in values["plain"].tobytes()


def test_progress_counts_what_runs_inside() -> None:
    ticks: list[int] = []
    meter = build_progress.Meter(ticks.append)
    meter.start("build", None, 4)
    meter.step("build")
    assert ticks[-1] == 25
    meter.start("tactics", "build", 10)
    for _ in range(5):
        meter.step("tactics")
    assert ticks[-1] == 37
    meter.start("again", "tactics", 0)
    meter.step("again")
    assert ticks[-1] == 40
    for phase in ("again", "tactics", "unknown"):
        meter.finish(phase)
        meter.step(phase)
    meter.step("build")
    assert ticks[-1] == 50
    meter.finish("build")
    assert ticks == list(range(1, 101))


def test_a_build_is_shown_from_nothing_to_all_of_it(tmp_path: Path, plugin: Path) -> None:
    shown: list[tuple[int, int | None]] = []

    class Counting(Silent):
        def track(self, items: Any, *, label: str, total: int | None = None) -> Any:
            for count, item in enumerate(items, start=1):
                shown.append((count, total))
                yield item

    building.build(order_of(linear(), tmp_path, plugin), Counting())
    assert shown == [(count, 100) for count in range(1, 101)]


def test_weights_are_counted_once(half_llama: Path) -> None:
    model = for_tensorrt(half_llama / "model.onnx", capacity=64).model
    data = (half_llama / "model.onnx.data").stat().st_size
    size = sum(weight.size for weight in weight_copies.weights_of(model))
    assert 0.9 * data < size < 1.1 * data
    assert isinstance(model, ir.Model)
