"""Products in bfloat16 for what needs no float32: near, and given back; some models untouched."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.calibration import forward_passes as passes
from nmexport.calibration import products
from nmexport.calibration.forward_passes import gather_channel_statistics
from nmexport.calibration.products import fast_products
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.targets import linears_of

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def model(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(products, "fast_dtype", lambda device: torch.bfloat16)
    source = resolve(ModelSection(id=str(tiny_llama)))
    return load_model(source, dtype="float32")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_products_are_near_and_the_model_is_left_as_it_was(model: Any) -> None:
    before, modules = logits(model), linears_of(model)
    with fast_products(model, least_parameters=1):
        near = logits(model)
        assert not linears_of(model)
    assert near.dtype == torch.float32
    assert 0 < float((near - before).abs().max()) < 0.05 * float(before.abs().max())
    assert linears_of(model) == modules
    assert torch.equal(logits(model), before)


def test_a_bias_is_added(model: Any) -> None:
    linear = model.model.layers[0].self_attn.q_proj
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 3.0))
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = linear(x)
        with fast_products(model, least_parameters=1):
            found = model.model.layers[0].self_attn.q_proj(x)
    assert torch.allclose(found, expected, atol=0.05)
    assert float(found.mean()) == pytest.approx(3.0, abs=0.5)


def test_large_models_are_not_copied(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = linears_of(model)
    monkeypatch.setattr(products, "_MOST_PARAMETERS", 1000)
    with fast_products(model, least_parameters=1):
        assert linears_of(model) == modules


def test_small_models_and_placed_ones_and_other_types_are_left_alone(model: Any) -> None:
    modules = linears_of(model)
    with fast_products(model):  # far below the least size
        assert linears_of(model) == modules
    model.hf_device_map = {"": "cpu"}
    with fast_products(model, least_parameters=1):
        assert linears_of(model) == modules
    del model.hf_device_map
    half = model.to(torch.float16)
    with fast_products(half, least_parameters=1):
        assert linears_of(half) == modules


def test_statistics_are_those_of_float32_within_what_averages_leave(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = torch.randint(3, 300, (8, 48), generator=torch.Generator().manual_seed(0))
    linears = linears_of(model)
    exact = gather_channel_statistics(model, linears, samples, progress=Silent())
    monkeypatch.setattr(passes, "fast_products", partial(fast_products, least_parameters=1))
    near = gather_channel_statistics(model, linears, samples, progress=Silent())
    for name in linears:
        assert near[name].tokens == exact[name].tokens
        error = (near[name].rms - exact[name].rms).abs() / exact[name].rms
        assert float(error.max()) < 0.01
    assert any(not torch.equal(near[name].rms, exact[name].rms) for name in linears)
    assert linears_of(model) == linears
