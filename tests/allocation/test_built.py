"""What was built of a choice: measured as the folded model, and chosen again where that counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.allocation.built import ATTEMPTS, Again, BuiltLinear, built_within, errors_as_built
from nmexport.allocation.probe import Probe, SparseInput
from nmexport.calibration.sites import Site
from nmexport.errors import RecipeError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of
from nmexport.store.allocation import Allocation, Built, Choice

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WINDOWS = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(1))
DOWN = "model.layers.0.mlp.down_proj"  # what it makes of a prompt, later layers read


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)


def built(linear: Any, behaviour: Behaviour, *, prompt: int = 0) -> BuiltLinear:
    def folded() -> dict[str, torch.Tensor]:
        return fold(linear, behaviour, Constants(), dtype=torch.float32)

    return BuiltLinear(behaviour, folded, prompt=prompt)


# -- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
@pytest.mark.parametrize("variance", [False, True])
def test_a_built_model_moves_predictions_as_its_trial_does(
    model: Any, phase: Any, variance: bool
) -> None:
    behaviour = Behaviour(pattern=NMPattern(8, 16), phase=phase, variance_correction=variance)
    linear = linears_of(model)[DOWN]
    site = Site(names=(DOWN,), in_features=128, out_features=(64,), layer=0)
    prompt = 0 if phase == "all" else 12
    probe = Probe(model, WINDOWS, prompt=prompt)
    tried = probe.measure({site: SparseInput(behaviour, Constants(), 128)})
    probe.start_at(1)
    found = probe.measure_modules({DOWN: built(linear, behaviour, prompt=prompt)})
    assert found.kl_mean > 0
    assert found.kl == pytest.approx(tried.kl, rel=1e-2)
    assert found.nll == pytest.approx(tried.nll, abs=1e-5)
    assert linears_of(model)[DOWN] is linear


def test_errors_are_those_of_each_linear_alone(model: Any) -> None:
    names = ("model.layers.0.mlp.up_proj", DOWN)
    linears = {name: linears_of(model)[name] for name in names}
    behaviour = Behaviour(pattern=NMPattern(8, 16))
    modules = {name: built(one, behaviour) for name, one in linears.items()}
    found = errors_as_built(model, linears, modules, WINDOWS, progress=Silent())
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        one.register_forward_pre_hook(
            lambda module, given, name=name: inputs[name].append(given[0])
        )
        for name, one in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            x = torch.cat(inputs[name])
            lost = (modules[name](x) - linear(x)).norm() / linear(x).norm()
            assert found[name] == pytest.approx(float(lost), rel=1e-4)
    kept = {DOWN: built(linears[DOWN], replace(behaviour, pattern=NMPattern(16, 16)))}
    only = {DOWN: linears[DOWN]}
    (error,) = errors_as_built(model, only, kept, WINDOWS, progress=Silent()).values()
    assert error == pytest.approx(0, abs=1e-6)


# -- choosing again --------------------------------------------------------------------------------


def chosen(relief: float, *, speedup: float | None = None) -> Allocation:
    """A choice that takes all that it may of the budget, and is the faster for it."""
    return Allocation(
        choices={"a": Choice(pattern=NMPattern(8, 16), criterion=f"{relief:.3f}")},
        budget={"max_kl": 0.1},
        bytes_saved=0.0,
        decode_speedup=1 + relief / 10 if speedup is None else speedup,
        kl=0.1 * relief,
        perplexity_ratio=1.0,
        price=None,
        front=(),
        ledger=(),
        budget_used=relief,
    )


def came_to(allocation: Allocation, used: float | None) -> Allocation:
    return replace(allocation, built=Built(kl=0.0, perplexity_ratio=1.0, budget_used=used))


def run(
    won_back: Callable[[float], float], *, again: Again = "always"
) -> tuple[list[float], Allocation]:
    """Reliefs that were tried, and what was taken; learning leaves a share of a divergence."""
    tried: list[float] = []

    def build(allocation: Allocation, attempt: int) -> tuple[int, Allocation]:
        assert attempt == len(tried)
        before = allocation.budget_used
        assert before is not None
        tried.append(before)
        return attempt, came_to(allocation, won_back(before))

    made, best = built_within(chosen, build, again=again)
    assert tried[made] == best.budget_used
    return tried, best


def test_what_building_loses_is_taken_off_the_budget() -> None:
    tried, best = run(lambda before: 1.25 * before, again="beyond")
    assert tried == pytest.approx([1.0, 0.8])
    assert best.built is not None
    assert best.built.budget_used == pytest.approx(1.0)
    tried, _ = run(lambda before: 0.4 * before, again="beyond")
    assert tried == [1.0]


def test_what_learning_wins_back_is_spent() -> None:
    tried, best = run(lambda before: 0.4 * before)
    assert tried == pytest.approx([1.0, 2.5])
    assert best.built is not None
    assert best.built.budget_used == pytest.approx(1.0)


def test_it_is_not_spent_unless_asked_for() -> None:
    tried, best = run(lambda before: 0.4 * before, again="never")
    assert tried == [1.0]
    assert best.budget_used == 1.0


def test_the_fastest_that_keeps_the_budget_is_taken() -> None:
    # The harder it is pressed, the less learning wins back: 1 gives 0.4, 2.5 gives 1.25, 2 gives 1.
    tried, best = run(lambda before: before * (0.4 if before == 1 else 0.5))
    assert tried == pytest.approx([1.0, 2.5, 2.0])
    assert best.budget_used == pytest.approx(2.0)
    # Overshot until the end: the first, which kept it, is what remains.
    tried, best = run(lambda before: 0.4 if before == 1 else 1.5)
    assert len(tried) == ATTEMPTS
    assert best.budget_used == 1.0


def test_a_model_that_breaks_its_budget_is_chosen_more_carefully() -> None:
    tried, best = run(lambda before: 1.25 * before)
    assert tried == pytest.approx([1.0, 0.8])
    assert best.built is not None
    assert best.built.budget_used == pytest.approx(1.0)


def test_relief_has_a_limit_and_nothing_is_built_twice() -> None:
    tried, _ = run(lambda _: 0.0)
    assert tried == [1.0, 10.0]


def test_only_a_budget_of_accuracy_can_count_it() -> None:
    def build(allocation: Allocation, attempt: int) -> tuple[int, Allocation]:
        return attempt, came_to(replace(allocation, budget_used=None), None)

    made, best = built_within(chosen, build, again="always")
    assert made == 0
    assert best.built is not None


def test_a_choice_out_of_reach_leaves_the_one_before() -> None:
    def choose(relief: float) -> Allocation:
        if relief != 1.0:
            raise RecipeError("No choice of patterns keeps the budget.")
        return chosen(relief)

    def build(allocation: Allocation, attempt: int) -> tuple[int, Allocation]:
        return attempt, came_to(allocation, 3.0)

    made, best = built_within(choose, build, again="always")
    assert made == 0
    assert best.built is not None
    assert best.built.budget_used == 3.0
    with pytest.raises(RecipeError):
        built_within(lambda _: choose(2.0), build, again="always")
