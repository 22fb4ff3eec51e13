"""Statistics equal a one-shot computation, however they were gathered."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from nmexport.calibration.forward_passes import (
    DenseRun,
    gather_channel_statistics,
    gather_errors,
    on_best_device,
)
from nmexport.calibration.local_error import ErrorObserver, observe_error
from nmexport.calibration.observers import ChannelObserver, ChannelSums
from nmexport.errors import ModelError
from nmexport.progress import Silent
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import linears_of

from tests.support.unfolded import folded_linear

if TYPE_CHECKING:
    from pathlib import Path

K = 48


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3 + index, K, generator=generator) * 10.0**index for index in range(count)
    ]


def observed(parts: list[torch.Tensor]) -> ChannelObserver:
    observer = ChannelObserver()
    for part in parts:
        observer.update(ChannelSums.of(part))
    return observer


def test_streaming_equals_one_shot() -> None:
    parts = batches(4)
    whole = torch.cat([part.reshape(-1, K) for part in parts]).double().numpy()
    statistics = observed(parts).statistics()
    assert statistics is not None
    assert statistics.tokens == len(whole)
    np.testing.assert_allclose(statistics.mean.numpy(), whole.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.rms.numpy(), np.sqrt((whole**2).mean(0)), rtol=1e-12)
    np.testing.assert_allclose(statistics.mean_magnitude.numpy(), np.abs(whole).mean(0), rtol=1e-12)


def test_merging_is_free_of_order() -> None:
    results = []
    for order in itertools.permutations(batches(3)):
        total = ChannelObserver()
        for part in order:
            total.merge(observed([part]))
        total.merge(ChannelObserver())
        statistics = total.statistics()
        assert statistics is not None
        results.append(statistics)
    for one in results[1:]:
        torch.testing.assert_close(one.mean, results[0].mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(one.rms, results[0].rms, rtol=1e-12, atol=0)


def test_half_inputs_are_summed_in_float64() -> None:
    x = torch.full((4096, 1), 0.1, dtype=torch.bfloat16)
    statistics = observed([x]).statistics()
    assert statistics is not None
    assert statistics.mean.item() == pytest.approx(float(x[0, 0]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inputs_are_left_as_they_were(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3)
    before = x.clone()
    ChannelSums.of(x)
    assert torch.equal(x, before)


def test_nothing_seen_is_nothing_known() -> None:
    assert ChannelObserver().statistics() is None
    assert ErrorObserver().relative_error() is None
    assert ErrorObserver().static_nu() == 1.0


@pytest.mark.parametrize("nu", [1.0, 1.2])
@pytest.mark.parametrize("shift", [None, 0.4])
@pytest.mark.parametrize("variance_correction", [False, True])
def test_relative_error_is_that_of_the_folded_linear(
    nu: float, shift: float | None, variance_correction: bool
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, 20)
    behaviour = Behaviour(pattern=NMPattern(8, 16), variance_correction=variance_correction)
    constants = Constants(shift=None if shift is None else torch.tensor([shift]))
    folded = folded_linear(
        linear, behaviour, Constants(shift=constants.shift, nu=None if nu == 1.0 else nu)
    )
    parts = [torch.randn(5, K), torch.randn(9, K) + 1]
    total = ErrorObserver()
    for part in parts:
        total.merge(observe_error(linear, behaviour, constants, part, linear(part)))
    whole = torch.cat(parts)
    with torch.no_grad():
        expected = (folded(whole) - linear(whole)).norm() / linear(whole).norm()
    assert total.relative_error(nu) == pytest.approx(expected.item(), rel=1e-4)
    assert total.tokens == len(whole)


def test_static_nu_is_the_mean_ratio_and_skips_silent_tokens() -> None:
    linear = torch.nn.Linear(16, 4)
    x = torch.zeros(3, 16)
    x[0, :8] = torch.linspace(1, 2, 8)
    x[1] = torch.linspace(-3, 3, 16)
    kept = x[1] * (x[1].abs() >= x[1].abs().sort().values[8])
    ratio = (x[1].var(correction=0) / kept.var(correction=0)).sqrt().item()
    behaviour = Behaviour(pattern=NMPattern(8, 16))
    observer = observe_error(linear, behaviour, Constants(), x, linear(x))
    assert observer.nu_tokens == 2  # the token of zeros has no variance to keep
    assert observer.static_nu() == pytest.approx((1.0 + ratio) / 2, rel=1e-5)


def test_dense_pattern_has_no_error_at_all() -> None:
    linear = torch.nn.Linear(K, 20)
    x = torch.randn(7, K)
    behaviour = Behaviour(pattern=NMPattern(16, 16))
    assert observe_error(linear, behaviour, Constants(), x, linear(x)).relative_error() == 0.0


def test_passes_see_what_the_linears_are_given_and_leave_no_hooks(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    samples = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    linears = linears_of(model)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _, arguments, name=name: seen.setdefault(name, []).append(arguments[0][0])
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for sample in samples:
            model(sample[None])
    for handle in handles:
        handle.remove()

    statistics = gather_channel_statistics(model, linears, samples, progress=Silent())
    assert set(statistics) == set(linears)
    for name in set(linears) - {"lm_head"}:
        whole = torch.cat(seen[name]).double()
        torch.testing.assert_close(statistics[name].mean, whole.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            statistics[name].rms, whole.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5
        )
    behaviour = Behaviour(pattern=NMPattern(8, 16))
    constants = dict.fromkeys(linears, Constants())
    behaviours = dict.fromkeys(linears, behaviour)
    run = DenseRun(
        model=model,
        linears=linears,
        constants=constants,
        behaviours=behaviours,
        samples=samples,
        progress=Silent(),
    )
    errors = gather_errors(run)
    assert all(0 < (one.relative_error() or 0) < 1 for one in errors.values())
    assert all(
        not linear._forward_pre_hooks and not linear._forward_hooks for linear in linears.values()
    )


def test_activations_that_overflow_are_refused(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    samples = torch.randint(3, 300, (1, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        gather_channel_statistics(model, linears_of(model), samples, progress=Silent())


@pytest.mark.parametrize(("free", "device"), [(0, "cpu"), (1 << 40, "cuda")])
def test_a_model_moves_to_a_gpu_only_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, free: int, device: str
) -> None:
    moved: list[str] = []

    class Model(torch.nn.Linear):
        def to(self, where: str) -> Model:  # type: ignore[override]
            moved.append(where)
            return self

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    on_best_device(Model(4, 4))
    assert moved == ([] if device == "cpu" else [device])
