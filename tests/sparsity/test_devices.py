"""A weight on a GPU meets constants on the host: nothing is computed with both, or copied back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nmexport.calibration.derivation import site_constants
from nmexport.calibration.sites import Site
from nmexport.recipe import SparsitySection
from nmexport.sparsity.fold import Corrections, fold
from nmexport.sparsity.linear import Behaviour, Constants, Remainder
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.statistics import ChannelStatistics
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.fake_gpu import fake_gpu, linear_on_gpu, on_gpu

K, O, R = 64, 32, 4  # noqa: E741 - the contract's names


class LargeOnTheHost(TorchDispatchMode):
    """Notes results on the host, copies aside, that are as large as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            is_result = func in {torch.ops.aten._to_copy.default, torch.ops.aten.detach.default}
            if result.device.type == "cpu" and result.numel() >= K * O and not is_result:
                self.made.append(str(func))
        return result


def constants() -> Constants:
    return Constants(
        shift=torch.randn(K),
        score_scale=torch.rand(K),
        channel_order=torch.randperm(K).int(),
        nu=1.1,
        remainder=Remainder(torch.randn(K, R), torch.randn(R, O)),
    )


def corrections() -> Corrections:
    return Corrections(
        shift=torch.randn(K),
        input_scale=torch.rand(K),
        output_scale=torch.rand(O),
        bias=torch.randn(O),
        low_rank_in=torch.randn(K, R),
        low_rank_out=torch.randn(R, O),
    )


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_folding_computes_where_the_weight_is(learned: bool, dynamic: bool) -> None:
    with fake_gpu():
        given = replace(constants(), shift=None) if dynamic else constants()
        found = corrections() if learned else Corrections()
        behaviour = Behaviour(pattern=NMPattern(8, 16), dynamic_shift=dynamic)
        with LargeOnTheHost() as host:
            folded = fold(linear_on_gpu(K, O), behaviour, given, found, dtype=torch.float16)
    assert host.made == []
    assert {tensor.device.type for tensor in folded.values()} == {"cpu"}
    assert folded["W"].shape == (K, O)
    assert folded["W"].dtype == torch.float16


@pytest.mark.parametrize("criterion", ["fisher", "wina", "act", "clact"])
def test_constants_of_a_weight_on_a_gpu_lie_on_the_host(criterion: str) -> None:
    with fake_gpu():
        wide = torch.rand(K, dtype=torch.float64)
        statistics = ChannelStatistics(
            tokens=8, mean=wide, rms=wide, mean_magnitude=wide, sensitivity=wide
        )
        site = Site(names=("q", "k"), in_features=K, out_features=(O, O), layer=0)
        linears = {name: linear_on_gpu(K, O) for name in site.names}
        section = SparsitySection(criterion=criterion, mitigations=("s-pts",))  # type: ignore[arg-type]
        # Groupings draw from a generator, which is real.
        section = section.model_copy(update={"grouping": "consecutive"})
        with LargeOnTheHost() as host:
            found = site_constants(
                site, linears, dict.fromkeys(site.names, statistics), section, seed=0
            )
    assert host.made == []
    assert found.shift is not None
    assert found.shift.device.type == "cpu"
    assert found.score_scale is None or found.score_scale.device.type == "cpu"


def test_the_fake_gpu_refuses_two_devices() -> None:
    with fake_gpu(), pytest.raises(RuntimeError, match="device"):
        on_gpu(3) + torch.ones(3)
