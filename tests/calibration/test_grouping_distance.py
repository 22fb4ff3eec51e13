"""How close an order of channels comes to unstructured selection."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.calibration.forward_passes import DenseRun
from nmexport.calibration.grouping_distance import grouping_distance, grouping_distances
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.sparsity.grouping import channel_order
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


def test_an_order_that_breaks_families_up_comes_close_to_unstructured() -> None:
    families = torch.arange(K).view(4, 16).t().reshape(-1)  # a quarter of each in every group
    distance = grouping_distance(together(), PATTERN, families)
    assert distance.unstructured < distance.ordered < 0.6 * distance.consecutive
    closed = distance.closed()
    assert closed is not None
    assert closed > 0.8


def test_unstructured_drops_the_smallest_half_and_consecutive_half_of_each_group() -> None:
    scores = torch.arange(32.0)[None]
    distance = grouping_distance(scores, PATTERN, None)
    squares = torch.arange(32.0).square()
    assert distance.total == float(squares.sum())
    assert distance.unstructured == float(squares[:16].sum())
    assert distance.consecutive == float(squares[:8].sum() + squares[16:24].sum())
    assert distance.ordered == distance.consecutive
    assert distance.closed() == 0.0


def test_distances_of_a_model_add_up_and_leave_no_hook(tiny_llama: Path) -> None:
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=torch.float32)
    linears = {name: one for name, one in linears_of(model).items() if name != "lm_head"}
    behaviours = dict.fromkeys(linears, Behaviour(pattern=PATTERN))
    samples = torch.randint(3, 384, (3, 32), generator=torch.Generator().manual_seed(0))
    constants = {
        name: Constants(
            channel_order=channel_order("balanced", torch.ones(linear.in_features), PATTERN)
        )
        for name, linear in linears.items()
    }
    run = DenseRun(
        model=model,
        linears=linears,
        constants=constants,
        behaviours=behaviours,
        samples=samples,
        progress=Silent(),
    )
    distances = grouping_distances(run)
    assert list(distances) == list(linears)
    for distance in distances.values():
        assert distance.unstructured <= distance.ordered <= distance.total
    halves = [grouping_distances(replace(run, samples=half)) for half in (samples[:1], samples[1:])]
    for name, distance in distances.items():
        assert (halves[0][name] + halves[1][name]).ordered == pytest.approx(distance.ordered)
    assert not any(module._forward_pre_hooks for module in linears.values())


def test_what_is_ranked_is_what_the_linear_ranks(tiny_llama: Path) -> None:
    """A shift per token moves the scores, and with them how close an order comes."""
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
        one = grouping_distance(scores, PATTERN, order)
        run = DenseRun(
            model=model,
            linears=linears,
            constants=constants,
            behaviours=behaviours,
            samples=samples,
            progress=Silent(),
        )
        distance = grouping_distances(run)[name]
        assert distance.ordered == pytest.approx(one.ordered, rel=1e-6)
    shifted.remove()
