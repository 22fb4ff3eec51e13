"""The stages calibrate and fold on a tiny model: same bytes, right contents, early refusals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.allocation.probe import spread_windows
from nmexport.calibration import effort, sparse_constants
from nmexport.environment import Environment
from nmexport.errors import ArtifactError, CorpusError, ModelError, PatternError, RecipeError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import Recipe
from nmexport.sparsity.linear import Behaviour, SparseLinear
from nmexport.sparsity.targets import linears_of
from nmexport.stages import calibrate, fold
from nmexport.stages.inputs import StageInputs
from nmexport.store.allocation import Built, read_allocation
from nmexport.store.tensors import ShardedWriter, TensorReader, load_tensors

from tests.support.sample_allocation import sample_allocation
from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = Environment(
    nmexport="0", python="3.11", system="test", cpu="test", isa=(), cores=1, memory_bytes=1 << 30
)

DOWN = "model.layers.1.mlp.down_proj"
UNTRAINED = {"criterion": "act", "mitigations": ("var",), "grouping": "balanced"}


def recipe_of(folder: Path, **sections: Any) -> Recipe:
    model_section = {"id": str(folder), **sections.pop("model", {})}
    calibration = {"samples": 5, "length": 24, **sections.pop("calibration", {})}
    sparsity = {**UNTRAINED, **sections.pop("sparsity", {})}
    return Recipe.model_validate(
        {
            "schema": 1,
            "model": model_section,
            "calibration": calibration,
            "sparsity": sparsity,
            **sections,
        }
    )


def inputs_of(recipe: Recipe, folder: Path) -> StageInputs:
    return StageInputs(
        recipe=recipe,
        source=resolve(recipe.model),
        environment=ENVIRONMENT,
        progress=Silent(),
        output=folder,
    )


def calibrated(recipe: Recipe, folder: Path) -> Path:
    output = folder / "calibrate"
    output.mkdir(parents=True)
    calibrate.run(inputs_of(recipe, output))
    return output


def folded(recipe: Recipe, folder: Path, calibration: Path) -> Path:
    output = folder / "fold"
    output.mkdir(parents=True)
    inputs = replace(inputs_of(recipe, output), upstream={"calibrate": calibration})
    fold.key_fields(inputs)
    fold.run(inputs)
    return output


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(recipe_of(tiny_llama), tmp_path_factory.mktemp("calibration"))


def test_the_same_inputs_give_the_same_bytes(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(
        tiny_llama, sparsity={"criterion": "wina", "mitigations": ("s-pts", "s-var")}
    )
    again = calibrated(recipe, tmp_path)
    assert digests(again) == digests(calibration)
    first = folded(recipe, tmp_path / "a", calibration)
    second = folded(recipe, tmp_path / "b", again)
    assert set(digests(first)) == {"model.safetensors", "layers.json"}
    assert digests(first) == digests(second)


def test_calibration_reads_back_typed(tiny_llama: Path, calibration: Path) -> None:
    artifact = calibrate.Artifact(calibration)
    assert artifact.samples().shape == (5, 24)
    names = [linear.name for linear in artifact.linears]
    model = load_model(resolve(recipe_of(tiny_llama).model))
    assert names == list(linears_of(model))
    statistics = artifact.statistics()
    assert statistics["model.layers.0.mlp.down_proj"].rms.shape == (128,)
    assert statistics["model.layers.0.mlp.down_proj"].tokens == 120


def test_calibration_does_not_depend_on_what_is_computed_with_it(tiny_llama: Path) -> None:
    def keys(stage: Any, **sections: Any) -> Any:
        return stage.key_fields(inputs_of(recipe_of(tiny_llama, **sections), tiny_llama))

    sparser = {"sparsity": {"pattern": "2:4", "criterion": "clact", "mitigations": ("s-var",)}}
    assert keys(calibrate, **sparser) == keys(calibrate)
    assert keys(fold, **sparser) != keys(fold)
    assert keys(calibrate, seed=1) != keys(calibrate)
    assert keys(calibrate, calibration={"samples": 4}) != keys(calibrate)
    json.dumps([keys(calibrate), keys(fold)])


def test_a_text_used_for_both_is_divided(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 400, encoding="utf-8")
    both = recipe_of(
        tiny_llama,
        calibration={"corpus": str(text)},
        evaluation={"corpus": str(text), "windows": 2, "length": 24},
    )
    fields = calibrate.key_fields(inputs_of(both, tmp_path))
    assert fields["reserved_tokens"] == 48
    assert fields["corpus"]["corpus"] == "txt"
    alone = recipe_of(tiny_llama, calibration={"corpus": str(text)})
    assert calibrate.key_fields(inputs_of(alone, tmp_path))["reserved_tokens"] == 0


@pytest.mark.parametrize(
    ("mitigations", "kinds"),
    [
        ((), {"W"}),
        (("d-pts", "var"), {"W", "shift_weight"}),
        (("s-pts", "s-var"), {"W", "bias", "shift"}),
        (("r-sparse", "var"), {"W", "remainder_in", "remainder_out"}),
        (("l-pts", "ls", "gain", "bias", "low-rank"), {"W", "bias", "shift"}),
        (("l-pts", "var"), {"W", "bias", "shift"}),
    ],
)
def test_folded_layers_run_in_the_model(
    tiny_llama: Path,
    calibration: Path,
    tmp_path: Path,
    mitigations: tuple[str, ...],
    kinds: set[str],
) -> None:
    section = {
        "criterion": "wina",
        "mitigations": mitigations,
        "grouping": "balanced",
        "effort": "fast",
        "targets": {"exclude": ("lm_head", "layer:0")},
    }
    recipe = recipe_of(tiny_llama, sparsity=section)
    artifact = fold.Artifact(folded(recipe, tmp_path, calibration))
    assert [spec.name.split(".")[2] for spec in artifact.layers] == ["1"] * 7
    modules: dict[str, torch.nn.Module] = {}
    for spec in artifact.layers:
        tensors = artifact.tensors(spec.name)
        order = artifact.input_order(spec.name)
        assert (order is None) == (spec.name != DOWN)
        ordered = {"channel_order"} if order is None else set()
        assert set(tensors) == kinds | {"score_scale"} | ordered
        assert tensors["W"].shape == (spec.in_features, spec.out_features)
        order = tensors["channel_order"] if order is None else order
        assert order.dtype == torch.int32
        assert spec.relative_error is not None
        assert 0 < spec.relative_error < 1
        behaviour = Behaviour(
            pattern=spec.pattern,
            dynamic_shift=spec.dynamic_shift,
            variance_correction=spec.variance_correction,
            phase=spec.phase,
        )
        modules[spec.name] = SparseLinear(behaviour, tensors)
    model = load_model(resolve(recipe.model))
    tokens = calibrate.Artifact(calibration).samples()
    with torch.no_grad():
        dense = model(tokens).logits
        replace_linears(model, modules)
        sparse = model(tokens).logits
    relative = ((sparse - dense).norm() / dense.norm()).item()
    assert 0 < relative < 0.6


def test_all_kept_is_the_dense_model(tiny_llama: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_llama, sparsity={"pattern": "16:16", "mitigations": ("s-pts", "var")})
    artifact = fold.Artifact(folded(recipe, tmp_path, calibration))
    assert all(spec.relative_error == 0.0 for spec in artifact.layers)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_folded_before_they_are_rounded(
    tiny_llama: Path, calibration: Path, tmp_path: Path, dtype: str
) -> None:
    section = {"mitigations": ("s-pts", "s-var")}
    half = recipe_of(tiny_llama, model={"dtype": dtype}, sparsity=section)
    whole = recipe_of(tiny_llama, sparsity=section)
    rounded = load_tensors(folded(half, tmp_path / "half", calibration) / "model.safetensors")
    exact = load_tensors(folded(whole, tmp_path / "whole", calibration) / "model.safetensors")
    for name, tensor in exact.items():
        in_type = name.endswith((".W", ".bias"))
        expected = tensor.to(getattr(torch, dtype)) if in_type else tensor
        assert torch.equal(rounded[name], expected)


def test_a_family_with_biases_keeps_them(tmp_path: Path) -> None:
    model = tmp_path / "qwen"
    model.mkdir()
    save_tiny_model(model, "qwen2")
    dense = load_model(resolve(recipe_of(model).model))
    with torch.no_grad():
        dense.model.layers[0].self_attn.k_proj.bias.copy_(torch.arange(32.0) * 10)
    dense.save_pretrained(model)
    recipe = recipe_of(model, sparsity={"mitigations": ()})
    artifact = fold.Artifact(folded(recipe, tmp_path, calibrated(recipe, tmp_path)))
    specs = {spec.name.rpartition(".")[2]: spec for spec in artifact.layers}
    assert specs["k_proj"].has_bias
    assert not specs["o_proj"].has_bias
    bias = artifact.tensors("model.layers.0.self_attn.k_proj")["bias"]
    assert torch.equal(bias, torch.arange(32.0) * 10)


def test_what_float16_cannot_hold_is_refused(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    model = load_model(resolve(recipe_of(tiny_llama).model))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    recipe = recipe_of(tmp_path / "large", model={"dtype": "float16"})
    with pytest.raises(ModelError, match=r"W of model\.layers\.0\.mlp\.up_proj.*float16"):
        folded(recipe, tmp_path, calibration)


def test_refusals_come_before_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    wrong_pattern = recipe_of(tiny_llama, sparsity={"pattern": "9:17"})
    with pytest.raises(PatternError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        calibrate.check(inputs_of(wrong_pattern, tmp_path))
    pair = recipe_of(tiny_llama, sparsity={"mitigations": ("var", "s-var")})
    with pytest.raises(RecipeError, match="variance correction"):
        fold.key_fields(inputs_of(pair, tmp_path))
    remainder = recipe_of(
        tiny_llama,
        sparsity={"mitigations": ("var", "r-sparse")},
        allocation={"budget": {"max_kl": 0.1}},
    )
    with pytest.raises(RecipeError, match="r-sparse cannot be used with --budget") as caught:
        fold.key_fields(inputs_of(remainder, tmp_path))
    assert "low-rank" in (caught.value.fix or "")
    missing = recipe_of(tiny_llama, calibration={"corpus": "missing.txt"})
    with pytest.raises(CorpusError, match=r"missing\.txt"):
        calibrate.key_fields(inputs_of(missing, tmp_path))


def test_scales_that_do_not_fit_are_refused_before_anything_is_learned(
    tiny_llama: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_constants, "learn", lambda *_, **__: pytest.fail("it learned first"))
    recipe = recipe_of(tiny_llama, model={"weights": "int8:128"})
    with pytest.raises(RecipeError, match=r"q_proj: its 64 channels are no multiple of 128"):
        folded(recipe, tmp_path, calibration)


def test_a_target_that_no_token_reached_is_named(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    for path in calibration.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    document = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))
    document["linears"][3]["tokens"] = 0
    (tmp_path / "layers.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj"):
        folded(recipe_of(tiny_llama), tmp_path, tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"schema": 99, "linears": []}', '{"schema": 1}'])
def test_damaged_calibration_is_said_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "layers.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"layers\.json"):
        _ = calibrate.Artifact(tmp_path).linears


BUDGET = {
    "budget": {"max_kl": 0.02},
    "patterns": ("8:16", "4:16"),
    "windows": 2,
    "length": 24,
    "front": (),
    # Only bytes count: on so small a model every overhead would outweigh what sparsity saves.
    "cost": {"dense_overhead_us": 0.0, "sparse_overhead_us": 0.0, "layer_overhead_us": 0.0},
}


def budgeted(folder: Path, **allocation: Any) -> Recipe:
    return recipe_of(
        folder,
        calibration={"samples": 24, "length": 48},
        sparsity={"mitigations": ("ls", "bias"), "effort": "fast"},
        allocation={**BUDGET, **allocation},
    )


@pytest.fixture(scope="module")
def longer_calibration(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(budgeted(tiny_llama), tmp_path_factory.mktemp("longer"))


def kl_of_folded(recipe: Recipe, artifact: fold.Artifact, windows: torch.Tensor) -> float:
    model = load_model(resolve(recipe.model))
    with torch.no_grad():
        dense = model(windows).logits[:, :-1].log_softmax(-1)
        replace_linears(
            model,
            {
                spec.name: SparseLinear(
                    Behaviour(pattern=spec.pattern), artifact.tensors(spec.name)
                )
                for spec in artifact.layers
            },
        )
        sparse = model(windows).logits[:, :-1].log_softmax(-1)
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def test_an_allocation_says_what_it_came_to_as_built(
    tiny_llama: Path, longer_calibration: Path, tmp_path: Path
) -> None:
    recipe = budgeted(tiny_llama)
    output = folded(recipe, tmp_path, longer_calibration)
    allocation = read_allocation(output)
    assert allocation is not None
    assert allocation.built is not None
    samples = calibrate.Artifact(longer_calibration).samples()
    held_out = spread_windows(samples, 2, 24, part=1)
    found = kl_of_folded(recipe, fold.Artifact(output), held_out)
    assert allocation.built.kl == pytest.approx(found, rel=1e-3)
    assert allocation.built.budget_used == pytest.approx(found / 0.02, rel=1e-3)
    assert allocation.budget_used == pytest.approx(allocation.kl / 0.02, rel=1e-3)
    for row in allocation.ledger:
        errors = row.mitigation_errors
        assert errors.keys() >= {"none", "var", "s-pts + var", "as built"}
        assert (errors["as built"] is None) == (row.choice.pattern is None)


def test_nothing_is_learned_from_what_measures_it(
    tiny_llama: Path, longer_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def watch(*given: Any, **_: Any) -> None:
        raise Seen(given[2])

    monkeypatch.setattr(sparse_constants, "learn", watch)
    with pytest.raises(Seen) as caught:
        folded(budgeted(tiny_llama), tmp_path, longer_calibration)
    learned = {tuple(row[:24]) for kind in caught.value.args[0] for row in kind.tolist()}
    samples = calibrate.Artifact(longer_calibration).samples()
    measuring = [spread_windows(samples, 2, 24, part=part) for part in (0, 1)]
    assert len(learned) == 24 - 4 + effort.EFFORTS["fast"].written
    assert not learned & {tuple(row) for windows in measuring for row in windows.tolist()}


def test_what_learning_wins_back_is_spent_where_it_counts(
    tiny_llama: Path, longer_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = effort.LearningSettings(steps=30, batch=2, length=24, rate=0.01, vocabulary=384)
    monkeypatch.setattr(effort, "EFFORTS", {"fast": short})
    plain = read_allocation(folded(budgeted(tiny_llama), tmp_path / "plain", longer_calibration))
    counting = budgeted(tiny_llama, count_learned=True)
    counted = read_allocation(folded(counting, tmp_path / "counted", longer_calibration))
    assert plain is not None
    assert plain.built is not None
    assert counted is not None
    assert counted.built is not None
    assert plain.built.kl < plain.kl
    assert counted.kl > plain.kl  # before learning it exceeds the budget
    assert counted.built.kl <= 0.02
    assert counted.decode_speedup > plain.decode_speedup


@pytest.mark.parametrize(("used", "said"), [(0.4, "1.100 as built"), (1.2, "exceeds the budget")])
def test_what_became_of_a_choice_is_said(used: float, said: str) -> None:
    allocation = replace(
        sample_allocation(), built=Built(kl=0.1, perplexity_ratio=1.1, budget_used=used)
    )
    words = allocation.summary()
    assert words.startswith("38% of the bytes saved: perplexity ratio 1.147 as chosen, ")
    assert words.endswith(said)


# -- tensors on disk -------------------------------------------------------------------------


def test_shards_hold_what_was_written_and_an_index_that_loads(tmp_path: Path) -> None:
    tensors = {f"layer.{index}.W": torch.full((10, 10), float(index)) for index in range(5)}
    with ShardedWriter(tmp_path, shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.add({name: tensor})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    reader = TensorReader(tmp_path)
    assert reader.names == sorted(tensors)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 2000


def test_a_failed_write_leaves_nothing_that_loads(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardedWriter(tmp_path) as writer:  # noqa: PT012
        writer.add({"a": torch.zeros(3)})
        raise RuntimeError
    with pytest.raises(ArtifactError):
        TensorReader(tmp_path)


def test_damaged_tensors_are_said_so(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path) as writer:
        writer.add({"a": torch.zeros(3)})
    with pytest.raises(ArtifactError, match="no tensor b"):
        TensorReader(tmp_path).read("b")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError, match="cannot be read"):
        TensorReader(tmp_path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_tensors(file)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="index"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    "section",
    [
        {"criterion": "wina", "grouping": "balanced", "mitigations": ("s-pts", "s-var")},
        {"criterion": "act", "grouping": "balanced", "mitigations": ("var", "r-sparse")},
    ],
    ids=["wina", "r-sparse"],
)
def test_folding_layer_by_layer_writes_the_same_bytes(
    tiny_llama: Path, calibration: Path, tmp_path: Path, section: dict[str, Any]
) -> None:
    whole = folded(recipe_of(tiny_llama, sparsity=section), tmp_path / "whole", calibration)
    layered = recipe_of(tiny_llama, sparsity=section, calibration={"offload": "layerwise"})
    assert digests(folded(layered, tmp_path / "layers", calibration)) == digests(whole)


def test_a_budget_is_refused_layer_by_layer(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    layered = recipe_of(
        tiny_llama,
        allocation=BUDGET,
        calibration={"offload": "layerwise"},
    )
    with pytest.raises(ModelError, match="--budget cannot") as caught:
        folded(layered, tmp_path, calibration)
    assert "drop --budget" in (caught.value.fix or "")


def test_sensitivities_layer_by_layer_fold_to_the_same_bytes(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    section = {"criterion": "fisher", "grouping": "balanced", "mitigations": ("s-var",)}
    whole = folded(recipe_of(tiny_llama, sparsity=section), tmp_path / "whole", calibration)
    layered = recipe_of(tiny_llama, sparsity=section, calibration={"offload": "layerwise"})
    assert digests(folded(layered, tmp_path / "layers", calibration)) == digests(whole)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_constants_are_learned_layer_by_layer_and_kept_apart_from_those_of_the_whole_model(
    tiny_llama: Path, longer_calibration: Path, tmp_path: Path, weights: str
) -> None:
    """The default recipe: all five parts, the default criterion and grouping."""
    section = {
        "criterion": "fisher",
        "mitigations": ("l-pts", "ls", "gain", "bias", "low-rank"),
        "grouping": "balanced",
        "effort": "fast",
    }
    whole, layered = (
        recipe_of(
            tiny_llama,
            sparsity=section,
            model={"weights": weights},
            calibration={"samples": 24, "length": 48, "offload": offload},
        )
        for offload in ("auto", "layerwise")
    )
    keys = [fold.key_fields(inputs_of(recipe, tmp_path)) for recipe in (whole, layered)]
    assert keys[0] != keys[1]
    output = tmp_path / "resumed" / "fold"
    output.mkdir(parents=True)
    inputs = replace(
        inputs_of(layered, output),
        upstream={"calibrate": longer_calibration},
        resume=tmp_path / "key",
    )
    fold.run(inputs)
    curve = fold.Artifact(output).learning["curve"]
    assert curve["block_steps"] > 0
    assert curve["learned"] == []
    assert len(list((tmp_path / "key").glob("learning-block-*.safetensors"))) == 2
    # And the same bytes from the checkpoints, and without any.
    expected = digests(output)
    again = tmp_path / "again"
    again.mkdir()
    fold.run(replace(inputs, output=again))
    assert digests(again) == expected
    assert digests(folded(layered, tmp_path / "fresh", longer_calibration)) == expected


def test_work_of_another_effort_is_not_up_to_date(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = budgeted(tiny_llama)
    inputs = inputs_of(recipe, tmp_path)
    before = fold.key_fields(inputs)
    assert fold.key_fields(inputs) == before
    changed = replace(effort.EFFORTS["fast"], disturbance=0.5)
    monkeypatch.setattr(effort, "EFFORTS", {**effort.EFFORTS, "fast": changed})
    assert fold.key_fields(inputs) != before


def test_where_nothing_is_learned_no_effort_is_in_the_key(tiny_llama: Path, tmp_path: Path) -> None:
    assert fold.key_fields(inputs_of(recipe_of(tiny_llama), tmp_path))["learning"] is None
