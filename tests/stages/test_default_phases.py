"""When a recipe that names no phases is sparse: decoded tokens on a GPU, all of them on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from nmexport.environment import probe
from nmexport.recipe import dump, load, resolve
from nmexport.stages import fitting
from nmexport.stages.fitting import with_own_phases

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.recipe import Recipe, SparsitySection


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "gpu_runs", lambda _: True)


def settled(recipe: Recipe) -> SparsitySection:
    return with_own_phases(recipe, probe()).sparsity


def recipe_of(**options: Any) -> Recipe:
    """A model without a recipe of its own."""
    return resolve("a/model", {key.replace("__", "."): value for key, value in options.items()})


@pytest.mark.usefixtures("gpu")
def test_a_gpu_decodes_sparsely_with_what_can_be_learned_around_a_weight() -> None:
    section = settled(recipe_of(sparsity__pattern="2:4"))
    assert (section.phases, section.mitigations) == ("decode", ("l-pts", "ls", "bias"))
    assert str(section.pattern) == "2:4"
    assert (
        section.model_copy(update={"phases": "all", "mitigations": ()})
        == recipe_of(sparsity__pattern="2:4", sparsity__mitigations=[]).sparsity
    )


def test_a_cpu_is_sparse_in_all_phases() -> None:
    recipe = recipe_of()
    assert with_own_phases(recipe, probe()) is recipe
    assert recipe.sparsity.phases == "all"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity__phases": "all"},
        {"sparsity__phases": "prefill", "sparsity__mitigations": ["var"]},
        {"sparsity__mitigations": ["l-pts", "gain"]},
        {"sparsity__mitigations": ["low-rank"]},
        {"sparsity__mitigations": ["r-sparse"]},
        {"allocation__phases": ["all", "decode"], "allocation__budget": {"max_bytes": 0.6}},
    ],
    ids=str,
)
def test_what_was_asked_for_stays(options: dict[str, Any]) -> None:
    recipe = recipe_of(**options)
    assert with_own_phases(recipe, probe()) is recipe


@pytest.mark.usefixtures("gpu")
def test_mitigations_that_leave_the_weight_alone_stay_as_named() -> None:
    section = settled(recipe_of(sparsity__mitigations=["s-pts", "s-var"]))
    assert (section.phases, section.mitigations) == ("decode", ("s-pts", "s-var"))


@pytest.mark.usefixtures("gpu")
def test_a_build_keeps_the_phases_that_it_was_begun_with(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe_of()), encoding="utf-8")
    begun = load(path)
    assert settled(begun).phases == "all"
    path.write_text(dump(with_own_phases(recipe_of(), probe())), encoding="utf-8")
    assert load(path).sparsity.phases == "decode"
