"""Trials: a site sparse in the running model equals the folded model, wherever a trial starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.allocation.probe import (
    Movement,
    Probe,
    SparseInput,
    mean_divergence,
    measure_alone,
    scored_positions,
    spread_windows,
)
from nmexport.calibration.checkpoint import Checkpoint
from nmexport.calibration.sites import Site, concatenated_weight, input_sites
from nmexport.errors import ModelError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of
from nmexport.store.allocation import Choice

from tests.support.tiny import FAMILIES, save_tiny_model
from tests.support.unfolded import UnfoldedLinear, folded_linear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

HALF = Behaviour(pattern=NMPattern(8, 16))
ORDER = torch.randperm(64, generator=torch.Generator().manual_seed(5)).int()


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)


@pytest.fixture(scope="module")
def linears(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: one for name, one in linears_of(model).items() if name != "lm_head"}


@pytest.fixture(scope="module")
def sites(model: Any, linears: Any) -> list[Site]:
    return input_sites(model, linears, windows_of(1)[0])


def windows_of(count: int, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 384, (count, length), generator=torch.Generator().manual_seed(1))


def half(site: Site, **more: Any) -> SparseInput:
    return SparseInput(replace(HALF, **more), Constants(), site.in_features)


# -- sites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_that_share_an_input_are_one_site(tmp_path: Path, family: str) -> None:
    save_tiny_model(tmp_path, family)
    model = load_model(resolve(ModelSection(id=str(tmp_path))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    found = input_sites(model, linears, windows_of(1)[0])
    kinds = [tuple(name.rpartition(".")[2] for name in site.names) for site in found]
    fused = family == "phi3"
    assert set(kinds[:4]) == {
        ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_up_proj",) if fused else ("gate_proj", "up_proj"),
        ("down_proj",),
    }
    assert [site.layer for site in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [name for site in found for name in site.names] == list(linears)
    whole = concatenated_weight(found[0], linears)
    assert whole.shape == (sum(found[0].out_features), found[0].in_features)
    assert found[0].weights == whole.numel()


def test_linears_that_no_token_reaches_stand_alone(model: Any, linears: Any) -> None:
    unused = {"unused.a": torch.nn.Linear(16, 8), "unused.b": torch.nn.Linear(16, 8)}
    found = input_sites(model, {**linears, **unused}, windows_of(1)[0])
    assert [site.names for site in found[-2:]] == [("unused.a",), ("unused.b",)]


# -- the sparse input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "constants"),
    [
        (HALF, Constants()),
        (replace(HALF, variance_correction=True), Constants(channel_order=ORDER)),
        (replace(HALF, dynamic_shift=True), Constants(score_scale=torch.linspace(0.5, 2, 64))),
        (HALF, Constants(shift=torch.tensor([0.3]), nu=1.2)),
        (replace(HALF, pattern=NMPattern(16, 16)), Constants(shift=torch.tensor([0.3]))),
    ],
)
def test_a_sparse_input_is_the_method_unfolded(behaviour: Behaviour, constants: Constants) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 64, generator=generator)
    linear = torch.nn.Linear(64, 16)
    sparse = SparseInput(behaviour, constants, 64)
    with torch.no_grad():
        expected = UnfoldedLinear(linear, behaviour, constants)(x)
        assert torch.allclose(linear(sparse(x)), expected, atol=1e-5)


def test_phases_divide_a_window_at_the_prompt() -> None:
    x = torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(0))
    whole = SparseInput(HALF, Constants(), 64)(x)
    decode = SparseInput(replace(HALF, phase="decode"), Constants(), 64)(x, prompt=4)
    prefill = SparseInput(replace(HALF, phase="prefill"), Constants(), 64)(x, prompt=4)
    assert torch.equal(decode, torch.cat([x[:, :4], whole[:, 4:]], dim=1))
    assert torch.equal(prefill, torch.cat([whole[:, :4], x[:, 4:]], dim=1))


# -- trials --------------------------------------------------------------------------------------


def folded_logits(model: Any, modules: dict[str, SparseLinear], ids: torch.Tensor) -> torch.Tensor:
    replaced = replace_linears(model, modules)
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return logits
    finally:
        replace_linears(model, replaced)


def folded(linears: Any, site: Site, behaviour: Behaviour = HALF) -> dict[str, SparseLinear]:
    return {name: folded_linear(linears[name], behaviour, Constants()) for name in site.names}


def test_a_trial_is_the_folded_model(model: Any, linears: Any, sites: list[Site]) -> None:
    windows = windows_of(2)
    chosen = (sites[0], sites[6])
    found = Probe(model, windows).measure({site: half(site) for site in chosen})
    modules = {**folded(linears, sites[0]), **folded(linears, sites[6])}
    with torch.no_grad():
        dense = torch.log_softmax(model(input_ids=windows).logits, -1)[:, :-1]
    sparse = torch.log_softmax(folded_logits(model, modules, windows), -1)[:, :-1]
    for index in range(2):
        kl = (dense[index].exp() * (dense[index] - sparse[index])).sum(-1).mean()
        assert found.kl[index] == pytest.approx(kl.item(), rel=1e-3)
        following = windows[index, 1:].unsqueeze(1)
        rise = (dense[index] - sparse[index]).gather(1, following).mean()
        assert found.nll[index] == pytest.approx(rise.item(), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_late_changes_nothing(tmp_path: Path, family: str) -> None:
    save_tiny_model(tmp_path, family)
    model = load_model(resolve(ModelSection(id=str(tmp_path))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    late = input_sites(model, linears, windows_of(1)[0])[-2]
    probe = Probe(model, windows_of(2))
    whole = probe.measure({late: half(late)})
    probe.start_at(1)
    assert probe.measure({late: half(late)}) == whole
    assert probe.measure({}).kl == (0.0, 0.0)
    with torch.no_grad():
        ids = windows_of(1)
        before = model(input_ids=ids).logits
        probe.start_at(0)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_nothing_before_the_start_may_be_sparse(model: Any, sites: list[Site]) -> None:
    probe = Probe(model, windows_of(1))
    probe.start_at(1)
    with pytest.raises(ValueError, match="start at layer 1"):
        probe.measure({sites[0]: half(sites[0])})


def test_layers_that_hand_on_more_than_their_output_run_whole(
    model: Any, sites: list[Site]
) -> None:
    """A model that resuming would get wrong: its first layer leaves something for the last."""
    left: dict[str, torch.Tensor] = {}

    def leave(module: Any, arguments: Any, output: torch.Tensor) -> None:
        left["value"] = output

    def take(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output + left.pop("value", torch.tensor(9.0))

    layers = model.model.layers
    hooks = [
        layers[0].self_attn.o_proj.register_forward_hook(leave),
        layers[1].register_forward_hook(take),
    ]
    try:
        probe = Probe(model, windows_of(1))
        whole = probe.measure({sites[-1]: half(sites[-1])})
        probe.start_at(1)
        assert probe.measure({sites[-1]: half(sites[-1])}) == whole
        assert probe.measure({sites[0]: half(sites[0])}).kl_mean > 0
    finally:
        for hook in hooks:
            hook.remove()


def test_decode_only_equals_token_by_token_through_the_cache(
    model: Any, linears: Any, sites: list[Site]
) -> None:
    windows, prompt = windows_of(1), 12
    behaviour = replace(HALF, phase="decode")
    found = Probe(model, windows, prompt=prompt).measure({sites[4]: half(sites[4], phase="decode")})
    replaced = replace_linears(model, folded(linears, sites[4], behaviour))
    try:
        with torch.no_grad():
            cache = model(input_ids=windows[:, :prompt], use_cache=True).past_key_values
            steps = []
            for token in windows[0, prompt:-1]:
                output = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                steps.append(output.logits[0, 0])
    finally:
        replace_linears(model, replaced)
    with torch.no_grad():
        dense = model(input_ids=windows).logits[0, prompt:-1].log_softmax(-1)
    sparse = torch.stack(steps).log_softmax(-1)
    expected = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    assert expected > 0
    assert found.kl_mean == pytest.approx(expected, rel=1e-3)


def test_a_dense_model_that_predicts_nothing_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    model = load_model(resolve(ModelSection(id=str(tmp_path))), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        Probe(model, windows_of(1))


# -- what is looked at ---------------------------------------------------------------------------


def test_positions_are_thinned_where_logits_would_not_fit() -> None:
    windows = torch.zeros(4, 256)
    assert scored_positions(windows, 0, 1000).tolist() == list(range(255))
    assert scored_positions(windows, 128, 1000)[0] == 128
    thinned = scored_positions(windows, 0, 1_000_000)
    assert 4 * 4 * 1_000_000 * len(thinned) <= 768 << 20
    assert thinned.diff().unique().numel() == 1


def test_windows_come_from_all_over_and_two_sets_share_none() -> None:
    samples = torch.arange(20).unsqueeze(1).expand(20, 6)
    first, second = (spread_windows(samples, 4, 3, part=part) for part in (0, 1))
    assert first.shape == (4, 3)
    assert not set(first[:, 0].tolist()) & set(second[:, 0].tolist())
    assert second[-1, 0] == 19
    assert spread_windows(samples[:1], 4, 9, part=1).shape == (1, 6)


def test_movement_sums_up_windows() -> None:
    moved = Movement(kl=(0.1, 0.3), nll=(0.0, 0.2))
    assert moved.kl_mean == pytest.approx(0.2)
    assert moved.kl_stderr == pytest.approx(0.1)
    assert moved.nll_mean == pytest.approx(0.1)
    assert Movement(kl=(0.1,), nll=(0.1,)).kl_stderr == 0.0
    same = torch.randn(3, 5).log_softmax(-1)
    assert mean_divergence(same, same) == 0.0


# -- one after another ---------------------------------------------------------------------------


class _Killed(Exception):
    pass


class DiesAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def track(self, items: Iterable[Any], *, label: str, total: int | None = None) -> Iterator[Any]:
        for count, item in enumerate(items):
            if count == self.steps:
                raise _Killed
            yield item


def test_killed_trials_go_on_to_the_same_figures(
    model: Any, sites: list[Site], tmp_path: Path
) -> None:
    choice = Choice(pattern=NMPattern(8, 16), criterion="act")
    trials: dict[Site, dict[Choice, SparseInput]] = {site: {choice: half(site)} for site in sites}
    trials[sites[2]] = {}
    whole = measure_alone(Probe(model, windows_of(2)), trials, progress=Silent())
    assert whole[sites[2]] == {}
    assert all(one[choice].kl_mean > 0 for site, one in whole.items() if site != sites[2])
    checkpoint = Checkpoint(tmp_path / "trials", "this")
    with pytest.raises(_Killed):
        measure_alone(
            Probe(model, windows_of(2)), trials, progress=DiesAfter(5), checkpoint=checkpoint
        )
    counted: list[Any] = []

    class Counts(Silent):
        def track(
            self, items: Iterable[Any], *, label: str, total: int | None = None
        ) -> Iterator[Any]:
            counted.extend(items)
            return iter(counted)

    again = measure_alone(
        Probe(model, windows_of(2)), trials, progress=Counts(), checkpoint=checkpoint
    )
    assert again == whole
    assert len(counted) == len(sites) - 5
