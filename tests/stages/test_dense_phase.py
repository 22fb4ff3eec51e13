"""`--phases decode` with learned constants: prompts meet the dense weight, decoded tokens them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from nmexport.allocation.ledger import AS_BUILT
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.stored_rows import rounded_rows
from nmexport.runtimes import native
from nmexport.sparsity.pattern import NMPattern
from nmexport.stages import exporting, fold
from nmexport.store.allocation import read_allocation
from nmexport.verification.reference import open_folded

from tests.stages.test_fold import calibrated, folded, recipe_of
from tests.support.exported import onnx_logits
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.recipe import Recipe

IDS = np.random.default_rng(3).integers(3, VOCABULARY, (1, 12))
PROMPT = 9
WEIGHTS = ("float", "int8", "int4")
LEARNED = {
    "phases": "decode",
    "mitigations": ("l-pts", "ls", "bias"),
    "effort": "fast",
    "criterion": "wina",
}
NEARNESS = {"float": 1e-4, "int8": 0.03, "int4": 0.25}
"""Of a stored weight to the model's."""


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose linears have a bias of their own."""
    folder = tmp_path_factory.mktemp("qwen2")
    save_tiny_model(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def calibration(biased: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(recipe_of(biased), tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module", params=WEIGHTS)
def built(
    request: pytest.FixtureRequest,
    biased: Path,
    calibration: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Recipe, fold.Artifact, Path]:
    """Recipe, folded model and export."""
    recipe = recipe_of(biased, sparsity=LEARNED, model={"weights": request.param})
    artifact = fold.Artifact(folded(recipe, tmp_path_factory.mktemp("fold"), calibration))
    output = tmp_path_factory.mktemp("export")
    model = load_model(resolve(recipe.model))
    traced = exporting.trace_model(model, [layer.name for layer in artifact.linears])
    stored = None
    if artifact.is_quantised:
        rows = functools.partial(rounded_rows, model, traced.read)
        stored = exporting.Stored(rows, artifact.dense_tensors)
    exporting.write_models(traced, artifact.linears, artifact.tensors, output, stored=stored)
    return recipe, artifact, output


def test_constants_lie_beside_the_weight(built: tuple[Recipe, fold.Artifact, Path]) -> None:
    recipe, artifact, _ = built
    model: Any = load_model(resolve(recipe.model))
    rounds = recipe.model.weights == "int8"
    for layer in artifact.layers:
        tensors, dense = artifact.tensors(layer.name), artifact.dense_tensors(layer.name)
        assert {"shift", "value_scale", "bias"} <= tensors.keys()
        assert ("dense_scale" in tensors) == rounds
        linear = model.get_submodule(layer.name)
        assert ("dense_bias" in tensors) == (linear.bias is not None)
        if rounds:
            learned = tensors["value_scale"] / tensors["dense_scale"]
            assert float(learned.std()) > 0
            assert float(tensors["dense_scale"].std()) > 0
        if recipe.model.weights == "float":
            assert dense["W"].equal(tensors["W"])
            assert _values(tensors["W"]).equal(_values(linear.weight.detach()))


def _values(weight: torch.Tensor) -> torch.Tensor:
    """All values, whatever the order of rows and columns."""
    return weight.reshape(-1).sort().values


def test_linears_of_one_input_are_one_node(built: tuple[Recipe, fold.Artifact, Path]) -> None:
    graph = onnx.load(built[2] / "model.onnx", load_external_data=False).graph
    sparse = [node for node in graph.node if node.op_type == "NMLinear" and _phase(node)]
    assert len(sparse) == 2 * 4  # q with k and v, o, gate with up, down
    assert {_phase(node) for node in sparse} == {"decode"}


def _phase(node: onnx.NodeProto) -> str | None:
    phases = [a.s.decode() for a in node.attribute if a.name == "phase"]
    return phases[0] if phases and phases[0] != "all" else None


def test_a_prompt_is_dense_and_a_decoded_token_is_not(
    built: tuple[Recipe, fold.Artifact, Path],
) -> None:
    """In torch, and in the file with the native op and without."""
    recipe, artifact, output = built
    model = load_model(resolve(recipe.model))
    with torch.no_grad():
        dense = model(torch.from_numpy(IDS)).logits.numpy()
    near = NEARNESS[recipe.model.weights]
    with open_folded(resolve(recipe.model), recipe.model, artifact) as session:
        prompt = session.prefill(IDS[:, :PROMPT])
        steps = [session.decode_step(IDS[:, place : place + 1]) for place in range(PROMPT, 12)]
    assert _error(prompt, dense[:, PROMPT - prompt.shape[1] : PROMPT]) < near
    decoded = np.concatenate([step.reshape(1, 1, -1) for step in steps], axis=1)
    assert _error(decoded, dense[:, PROMPT:]) > 2 * NEARNESS["float"]
    for library in {None, native.find_library()}:
        made = onnx_logits(
            output / "model.onnx", IDS, np.ones_like(IDS), prefill=PROMPT, library=library
        )
        assert _error(made[:, :PROMPT], dense[:, :PROMPT]) < near
        assert _error(made[:, PROMPT:], decoded) < 0.02


def _error(made: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(made - expected) / np.linalg.norm(expected))


def test_a_static_variance_leaves_the_weight_alone(
    biased: Path, calibration: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(biased, sparsity={"phases": "decode", "mitigations": ("s-pts", "s-var")})
    artifact = fold.Artifact(folded(recipe, tmp_path, calibration))
    tensors = artifact.tensors(artifact.layers[0].name)
    assert len(set(tensors["value_scale"].tolist())) == 1
    assert tensors["value_scale"][0] > 1
    weight = load_model(resolve(recipe.model)).get_submodule(artifact.layers[0].name).weight
    assert _values(tensors["W"]).equal(_values(weight.detach()))


@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("phases", [("decode",), ("decode", "prefill")], ids=len)
def test_a_budget_measures_what_is_built(
    biased: Path, calibration: Path, tmp_path: Path, weights: str, phases: tuple[str, ...]
) -> None:
    """Each linear alone on tokens of its phase, and the model on prompts and what follows."""
    recipe = recipe_of(
        biased,
        sparsity={**LEARNED, "mitigations": ("s-pts", "var"), "criterion": "act"},
        model={"weights": weights},
        allocation={
            "budget": {"max_bytes": 0.7},
            "patterns": (NMPattern(8, 16),),
            "phases": phases,
            "windows": 2,
            "length": 12,
            "front": (0.2,),
        },
    )
    artifact = fold.Artifact(folded(recipe, tmp_path, calibration))
    allocation = read_allocation(artifact.path)
    assert allocation is not None
    assert allocation.built is not None
    assert {layer.phase for layer in artifact.layers} <= set(phases)
    errors = {row.name: row.mitigation_errors[AS_BUILT] for row in allocation.ledger}
    for layer in artifact.layers:
        assert 0.01 < errors[layer.name] < 1
    assert artifact.layers
