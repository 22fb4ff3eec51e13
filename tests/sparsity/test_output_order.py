"""Linears laid out for what reads them compute what they did before."""

from __future__ import annotations

import pytest
import torch
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, Remainder, SparseLinear
from nmexport.sparsity.output_order import NATURAL, OutputOrders, columns_for
from nmexport.sparsity.pattern import NMPattern
from torch import nn

HIDDEN, INNER = 32, 64
HALF = Behaviour(pattern=NMPattern(8, 16))


def constants(channels: int, outputs: int, seed: int) -> Constants:
    """Everything that can lie along channels or outputs."""
    noise = torch.Generator().manual_seed(seed)
    return Constants(
        score_scale=torch.rand(channels, generator=noise) + 0.5,
        channel_order=torch.randperm(channels, generator=noise).int(),
        shift=torch.randn(channels, generator=noise) * 0.1,
        remainder=Remainder(
            torch.randn(channels, 3, generator=noise) * 0.1,
            torch.randn(3, outputs, generator=noise) * 0.1,
        ),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_gated_mlp_computes_the_same(packed: bool) -> None:
    torch.manual_seed(0)
    names = ["both"] if packed else ["gate", "up"]
    width = 2 * INNER // len(names)
    linears = {name: nn.Linear(HIDDEN, width) for name in names} | {"down": nn.Linear(INNER, 24)}
    folded = {
        name: fold(
            one,
            HALF,
            constants(one.in_features, one.out_features, seed),
            dtype=torch.float32,
        )
        for seed, (name, one) in enumerate(linears.items())
    }
    order = folded["down"]["channel_order"]
    orders = OutputOrders(readers=dict.fromkeys(names, "down"), orders={"down": order})

    def run(orders: OutputOrders, x: torch.Tensor) -> torch.Tensor:
        parts = {
            name: SparseLinear(
                HALF, orders.applied(name, folded[name], outputs=linears[name].out_features)
            )
            for name in folded
        }
        made = torch.cat([parts[name](x) for name in names], dim=-1)
        gate, up = made.chunk(2, dim=-1)
        y: torch.Tensor = parts["down"](nn.functional.silu(gate) * up)
        return y

    x = torch.randn(5, HIDDEN)
    assert "channel_order" not in orders.applied("down", folded["down"], outputs=24)
    assert "channel_order" in orders.applied(names[0], folded[names[0]], outputs=width)
    torch.testing.assert_close(run(orders, x), run(NATURAL, x), rtol=1e-5, atol=1e-5)


def test_what_is_not_laid_out_stays_as_it_is() -> None:
    folded = {"W": torch.randn(4, 6), "channel_order": torch.randperm(4).int()}
    assert NATURAL.applied("any", folded, outputs=6) == folded


def test_a_dense_twin_moves_without_the_weight_that_it_shares() -> None:
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    orders = OutputOrders(readers={"gate": "down"}, orders={"down": order})
    scale = torch.arange(6.0).unsqueeze(0)
    moved = orders.applied("gate", {"weight_scale": scale}, outputs=6)
    assert moved["weight_scale"].tolist() == [[2.0, 0.0, 1.0, 5.0, 3.0, 4.0]]
    assert columns_for(order, 6).tolist() == [2, 0, 1, 5, 3, 4]
