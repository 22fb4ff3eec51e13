"""Channel orders: the search lowers what it says, and that is what selection loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.calibration import order_search
from nmexport.calibration.order_search import (
    Coactivation,
    grouping_distance,
    grouping_distances,
    search_order,
    search_orders,
    wanted,
)
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of

if TYPE_CHECKING:
    from pathlib import Path

PATTERN = NMPattern(8, 16)
K = 64


def together(tokens: int = 600, *, seed: int = 0) -> torch.Tensor:
    """Scores of which neighbours are large together: consecutive groups are the worst choice."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, K // 16, generator=generator).exp()
    own = torch.randn(tokens, K, generator=generator).mul(0.3).exp()
    return common.repeat_interleave(16, dim=1) * own


def seen(scores: torch.Tensor) -> Coactivation:
    coactivation = Coactivation.empty(scores.shape[1])
    coactivation.update(scores, PATTERN.density)
    return coactivation


def test_half_of_the_channels_are_wanted_and_the_larger_more() -> None:
    scores = torch.arange(1.0, 17.0)[None]
    want = wanted(scores, 0.5)[0]
    assert bool((want.diff() > 0).all())
    assert int((want > 0.5).sum()) == 8
    assert bool(wanted(torch.zeros(1, 16), 0.5).isfinite().all())


def test_search_separates_channels_that_go_together() -> None:
    scores = together()
    found = search_order(seen(scores), PATTERN)
    assert sorted(found.order.tolist()) == list(range(K))
    assert found.order.dtype == torch.int32
    assert found.found < 0.5 * found.start
    families = found.order.view(-1, 16) // 16
    for group in families:  # a quarter of every family in every group
        assert torch.bincount(group.long(), minlength=4).max() <= 6
    distance = grouping_distance(together(seed=1), PATTERN, found.order)
    assert distance.unstructured < distance.ordered < 0.6 * distance.consecutive
    closed = distance.closed()
    assert closed is not None
    assert closed > 0.8


def test_reported_cost_is_the_deviation_of_the_groups_counts() -> None:
    scores = together(200)
    found = search_order(seen(scores), PATTERN)
    want = wanted(scores, PATTERN.density)
    counts = want[:, found.order.long()].view(len(want), -1, 16).sum(dim=2)
    share = 16 * want.mean()
    direct = float((counts - share).square().mean(dim=0).sum())
    assert found.found == pytest.approx(direct, rel=1e-3)


def test_every_exchange_lowers_the_cost() -> None:
    cost = seen(together(100)).deviations()
    group_of = torch.arange(K) // 16
    before = order_search._within(cost, group_of)
    exchanges = order_search._best_exchanges(cost, group_of, torch.arange(K))
    assert exchanges
    one, other = exchanges[0]
    group_of[one], group_of[other] = group_of[other].clone(), group_of[one].clone()
    assert order_search._within(cost, group_of) < before


def test_coactivations_merge_and_searches_repeat() -> None:
    scores = together()
    whole, first, second = seen(scores), seen(scores[:250]), seen(scores[250:])
    first.merge(second)
    assert first.tokens == whole.tokens
    torch.testing.assert_close(first.deviations(), whole.deviations(), rtol=1e-4, atol=1e-5)
    once, again = (search_order(whole, PATTERN, seed=3) for _ in range(2))
    assert torch.equal(once.order, again.order)


def test_rows_at_a_time_are_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = together(150)
    whole = seen(scores)
    mean = whole.total / whole.tokens
    off = mean - mean.mean()
    covariance = whole.products.double() / whole.tokens - torch.outer(mean, mean)
    expected = (covariance + torch.outer(off, off)).float()
    monkeypatch.setattr(order_search, "_ROWS", 24)
    blocked = seen(scores)
    torch.testing.assert_close(blocked.products, whole.products)
    blocked.products = whole.products
    assert torch.equal(blocked.deviations(), expected)


def test_costs_to_groups_are_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = seen(together(100)).deviations()
    group_of = torch.randperm(K, generator=torch.Generator().manual_seed(1)) // 16
    few = order_search._costs_to_groups(cost[:10], group_of)
    monkeypatch.setattr(order_search, "SWEEP_CHANNELS", 24)
    torch.testing.assert_close(order_search._costs_to_groups(cost[:10], group_of), few)
    one, other = cost[3, group_of == 2].sum(), few[3, 2]
    torch.testing.assert_close(one, other)


def test_wide_inputs_are_compared_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_search, "SWEEP_CHANNELS", 24)
    found = search_order(seen(together()), PATTERN, sweeps=60)
    assert found.sweeps == 60
    assert found.found < 0.7 * found.start
    assert sorted(found.order.tolist()) == list(range(K))


def test_waves_and_whole_find_the_same_on_a_model(tiny_llama: Path) -> None:
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    constants = {name: Constants() for name in linears}
    behaviours = dict.fromkeys(linears, Behaviour(pattern=PATTERN))
    samples = torch.randint(3, 384, (3, 32), generator=torch.Generator().manual_seed(0))

    def search(wave_bytes: int) -> dict[str, list[int]]:
        found = search_orders(
            model, linears, constants, behaviours, samples,
            progress=Silent(), wave_bytes=wave_bytes,
        )  # fmt: skip
        return {name: one.order.tolist() for name, one in found.items()}

    at_once, in_waves = search(1 << 30), search(1)
    assert at_once == in_waves
    assert list(at_once) == list(linears)
    ordered = {
        name: Constants(channel_order=torch.tensor(order)) for name, order in at_once.items()
    }
    distances = grouping_distances(model, linears, ordered, behaviours, samples, progress=Silent())
    for distance in distances.values():
        assert distance.unstructured <= distance.ordered <= distance.total
    assert sum(one.ordered for one in distances.values()) < sum(
        one.consecutive for one in distances.values()
    )
    assert not any(module._forward_pre_hooks for module in linears.values())


def test_what_is_ranked_is_what_the_linear_ranks(tiny_llama: Path) -> None:
    """A shift per token moves the scores, and with them the order and how close it comes."""
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj"
    linears = {name: model.get_submodule(name)}
    samples = torch.randint(3, 384, (2, 32), generator=torch.Generator().manual_seed(0))
    inputs: list[torch.Tensor] = []
    hook = linears[name].register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0][0].clone() + 3.0)
    )
    shifted = linears[name].register_forward_pre_hook(lambda _, given: (given[0] + 3.0,))
    with torch.inference_mode():
        for sample in samples:
            model(input_ids=sample[None])
    hook.remove()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(2)).int()
    constants = {name: Constants(channel_order=order)}
    for dynamic in (False, True):
        behaviours = {name: Behaviour(pattern=PATTERN, dynamic_shift=dynamic)}
        tokens = torch.cat(inputs)
        scores = (tokens - tokens.mean(dim=1, keepdim=True) if dynamic else tokens).abs()
        expected = search_order(seen_by(scores), PATTERN).order
        found = search_orders(
            model, linears, {name: Constants()}, behaviours, samples, progress=Silent()
        )
        assert torch.equal(found[name].order, expected)
        one = grouping_distance(scores, PATTERN, order)
        distance = grouping_distances(
            model, linears, constants, behaviours, samples, progress=Silent()
        )[name]
        assert distance.ordered == pytest.approx(one.ordered, rel=1e-6)
    shifted.remove()


def seen_by(scores: torch.Tensor) -> Coactivation:
    """Gathered sample by sample, as a model's inputs are."""
    coactivation = Coactivation.empty(scores.shape[1])
    for sample in scores.chunk(2):
        coactivation.update(sample, PATTERN.density)
    return coactivation


def test_a_linear_that_nothing_reached_has_no_order(tiny_llama: Path) -> None:
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj"
    linears = {name: model.get_submodule(name), "expert": torch.nn.Linear(64, 64)}
    found = search_orders(
        model,
        linears,
        dict.fromkeys(linears, Constants()),
        dict.fromkeys(linears, Behaviour(pattern=PATTERN)),
        torch.randint(3, 384, (1, 16)),
        progress=Silent(),
    )
    assert list(found) == [name]
