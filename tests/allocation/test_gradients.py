"""Costs of sites by gradient: what trials would find, for a fraction of the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.allocation.gradients import estimate_alone
from nmexport.allocation.probe import Probe, SparseInput, measure_alone
from nmexport.calibration.sites import Site, input_sites
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of
from nmexport.store.allocation import Choice

if TYPE_CHECKING:
    from pathlib import Path

WINDOWS = torch.randint(3, 384, (24, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)


@pytest.fixture(scope="module")
def sites(model: Any) -> list[Site]:
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    return list(input_sites(model, linears, WINDOWS[0]))


def trials_of(sites: list[Site], phase: Any = "all") -> dict[Site, dict[Choice, SparseInput]]:
    """Twelve and eight of sixteen at every site."""
    patterns = [NMPattern(kept, 16) for kept in (12, 8)]
    return {
        site: {
            Choice(pattern=pattern, criterion="act", phase=phase): SparseInput(
                Behaviour(pattern=pattern, phase=phase), Constants(), site.in_features
            )
            for pattern in patterns
        }
        for site in sites
    }


@pytest.mark.parametrize(("phase", "prompt"), [("all", 0), ("decode", 16)])
def test_estimates_are_what_trials_measure(
    model: Any, sites: list[Site], phase: Any, prompt: int
) -> None:
    trials = trials_of(sites, phase)
    measured = measure_alone(Probe(model, WINDOWS, prompt=prompt), trials, progress=Silent())
    found = estimate_alone(model, WINDOWS, trials, prompt=prompt, progress=Silent())
    assert list(found) == list(trials)
    for site, choices in trials.items():
        for choice in choices:
            ratio = found[site][choice].kl_mean / measured[site][choice].kl_mean
            assert 0.6 < ratio < 1.6, (site.names, choice.label)
    pairs = [
        (found[site][choice].kl_mean, measured[site][choice].kl_mean)
        for site, choices in trials.items()
        for choice in choices
    ]
    assert sum(one for one, _ in pairs) == pytest.approx(sum(two for _, two in pairs), rel=0.2)


def test_the_model_is_left_as_it_is_and_a_seed_gives_the_same(
    model: Any, sites: list[Site]
) -> None:
    needed = [parameter.requires_grad for parameter in model.parameters()]
    trials = trials_of(sites[:2])
    first, again, other = (
        estimate_alone(model, WINDOWS[:3], trials, prompt=0, progress=Silent(), seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_site_that_no_text_reaches_costs_nothing(model: Any, sites: list[Site]) -> None:
    unreached = torch.nn.Linear(64, 8)
    model.add_module("unused", unreached)
    try:
        alone = Site(names=("unused",), in_features=64, out_features=(8,), layer=1)
        found = estimate_alone(
            model, WINDOWS[:2], trials_of([sites[0], alone]), prompt=0, progress=Silent()
        )
    finally:
        del model.unused
    assert {movement.kl for movement in found[alone].values()} == {(0.0, 0.0)}
