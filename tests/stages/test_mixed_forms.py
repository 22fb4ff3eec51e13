"""Linears whose weights a budget stores unlike: fold, export, torch and ONNX Runtime agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.calibration.sparse_constants import make_constants
from nmexport.models.source import resolve
from nmexport.runtimes import native
from nmexport.stages import fold
from nmexport.verification.reference import open_dense, open_folded

from tests.stages.test_fold import calibrated, folded, recipe_of
from tests.support.exported import export_stored, onnx_logits
from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

FORMS = ("float", "int8", "int4:64")
TYPES = {"float": "float", "int8": "int8", "int4:64": "int4"}
ALLOCATION: Any = {"budget": {"max_bytes": 0.5}, "weights": FORMS}


def chosen(inputs: Any, dense: Any, learning: Any) -> tuple[Any, dict[str, str]]:
    """Every kind there is: site by site another form, every second site sparse."""
    forms = {
        name: FORMS[place % 3] for place, site in enumerate(dense.sites) for name in site.names
    }
    sections = {
        name: inputs.recipe.sparsity
        for place, site in enumerate(dense.sites)
        for name in site.names
        if place // 3 % 2 == 0
    }
    return make_constants(dense, sections, learning=learning), forms


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> fold.Artifact:
    recipe = recipe_of(
        tiny_llama,
        allocation=ALLOCATION,
        sparsity={"mitigations": ("var",)},
    )
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold, "_within_budget", chosen)
        return fold.Artifact(folded(recipe, folder / "fold", calibrated(recipe, folder)))


def test_each_linear_has_its_own_form_sparse_or_dense(artifact: fold.Artifact) -> None:
    sparse = {layer.weight_type for layer in artifact.layers}
    assert sparse == {"float", "int8", "int4"}
    assert {layer.weight_type for layer in artifact.dense_layers} == {"int8", "int4"}
    for layer in artifact.linears:
        tensors = artifact.tensors(layer.name)
        assert ("weight_scale" in tensors) == (layer.weight_type != "float")
        assert ("value_scale" in tensors) == (layer.weight_type == "int8")
        assert layer.activation_bits == (0 if layer.weight_type == "float" else 8)
        beside = artifact.dense_tensors(layer.name)
        assert ("weight_scale" in beside) == (layer.weight_type != "float")
    assert artifact.embedding_bits == 8


@pytest.fixture(scope="module")
def exported(
    artifact: fold.Artifact, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("export")
    export_stored(artifact, recipe_of(tiny_llama).model, output)
    return output


def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(3, VOCABULARY, (1, 12))


def distance(path: Path, expected: np.ndarray, **options: Any) -> float:
    actual = onnx_logits(path, ids(), np.ones_like(ids()), prefill=8, **options)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_the_file_computes_what_torch_computes(
    artifact: fold.Artifact, exported: Path, tiny_llama: Path
) -> None:
    section = recipe_of(tiny_llama).model
    with open_folded(resolve(section), section, artifact) as session:
        expected = session.prefill(ids())
    for library in {None, native.find_library()}:
        # A value that lies between two of 8 bits may fall to either.
        assert distance(exported / "model.onnx", expected, library=library) < 0.02


def test_the_dense_file_in_the_same_forms_is_near_the_dense_one(
    exported: Path, tiny_llama: Path
) -> None:
    section = recipe_of(tiny_llama).model
    with open_dense(resolve(section), section) as session:
        expected = session.prefill(ids())
    assert distance(exported / "dense" / "stored" / "model.onnx", expected) < 0.25
