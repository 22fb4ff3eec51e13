"""Constants by site: what linears of one input share, what each has of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.calibration import derivation
from nmexport.calibration.forward_passes import gather_channel_statistics
from nmexport.calibration.sites import concatenated_weight, input_sites
from nmexport.errors import ModelError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection, SparsitySection
from nmexport.sparsity.criterion import score_scale
from nmexport.sparsity.targets import linears_of

if TYPE_CHECKING:
    from pathlib import Path

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def given(tiny_llama: Path) -> Any:
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    samples = torch.randint(3, 384, (8, 32), generator=torch.Generator().manual_seed(0))
    statistics = gather_channel_statistics(model, linears, samples, progress=Silent())
    return model, linears, samples, input_sites(model, linears, samples[0]), statistics


def derived_with(given: Any, **changed: Any) -> dict[str, derivation.Derived]:
    _, linears, _, sites, statistics = given
    section = SparsitySection.model_validate({"mitigations": (), **changed})
    return derivation.derive(sites, linears, statistics, dict.fromkeys(linears, section), seed=0)


def test_a_criterion_that_looks_at_weights_sees_those_of_the_site(given: Any) -> None:
    _, linears, _, sites, _ = given
    derived = derived_with(given, criterion="wina", grouping="balanced")
    assert list(derived) == list(linears)
    for site in sites:
        joint = score_scale("wina", concatenated_weight(site, linears))
        for name in site.names:
            assert torch.equal(derived[name].constants.score_scale, joint)
            assert derived[name].constants is derived[site.names[0]].constants


def test_linears_without_a_section_stay_dense(given: Any) -> None:
    _, linears, _, sites, statistics = given
    section = SparsitySection(criterion="act", mitigations=())
    some = dict.fromkeys(sites[0].names, section)
    assert list(derivation.derive(sites, linears, statistics, some, seed=0)) == list(some)


def test_sensitivities_of_a_site_add_up_and_rank_its_channels(given: Any) -> None:
    model, linears, samples, sites, statistics = given

    def measured(criterion: str) -> dict[str, Any]:
        return derivation.with_sensitivities(
            model, sites, linears, statistics, samples[:2], criteria={criterion}, progress=Silent()
        )

    assert measured("act") == statistics  # not measured where nothing needs them
    found = measured("fisher")
    for site in sites:
        first, *others = (found[name].sensitivity for name in site.names)
        assert bool((first > 0).all())
        assert all(torch.equal(first, other) for other in others)
    derived = derivation.derive(
        sites,
        linears,
        found,
        dict.fromkeys(linears, SparsitySection(criterion="fisher", mitigations=())),
        seed=0,
    )
    scale = derived[sites[0].names[0]].constants.score_scale
    assert torch.equal(scale.argsort(), found[sites[0].names[0]].sensitivity.float().argsort())
    assert float(scale.mean()) == pytest.approx(1.0, rel=1e-3)


def test_a_linear_that_no_prediction_depends_on_is_named(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, linears, samples, sites, statistics = given
    gathered = derivation.gather_sensitivities
    missing: list[str] = []

    def some(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        found = gathered(*arguments, **options)
        return {name: one for name, one in found.items() if name not in missing}

    monkeypatch.setattr(derivation, "gather_sensitivities", some)

    def measured() -> dict[str, Any]:
        return derivation.with_sensitivities(
            model, sites, linears, statistics, samples[:2], criteria={"fisher"}, progress=Silent()
        )

    whole = measured()
    first, second, *_ = sites[0].names
    missing.append(second)  # the others of its site tell of their input
    part = measured()[second].sensitivity
    assert bool((part <= whole[second].sensitivity).all())
    missing.extend(sites[0].names)
    with pytest.raises(ModelError, match=f"depends on {first}") as caught:
        measured()
    assert f"--targets '!{first}'" in str(caught.value.fix)
