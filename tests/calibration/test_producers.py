"""What makes the input of a linear is found by running its module, and only where it is certain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nmexport.calibration.producers import Feed, find_feeds, producers_of
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN, INNER = 12, 32
Activation = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu squared": lambda x: functional.relu(x).square(),
    "even": torch.square,
}


class Mlp(nn.Module):
    """A module of linears, whose code is a function of it and its input."""

    def __init__(self, code: Callable[[Any, torch.Tensor], Any], **outputs: int) -> None:
        super().__init__()
        self.code = code
        for name, width in outputs.items():
            setattr(self, name, nn.Linear(HIDDEN, width))
        self.down = nn.Linear(INNER, HIDDEN)
        self.gains = nn.Parameter(torch.linspace(0.5, 2.0, INNER))

    def forward(self, x: torch.Tensor) -> Any:
        return self.code(self, x)


def mlp(code: Callable[[Any, torch.Tensor], Any], **outputs: int) -> Mlp:
    return Mlp(code, **(outputs or {"gate": INNER, "up": INNER})).eval()


def gated(act: Callable[[torch.Tensor], torch.Tensor]) -> Mlp:
    return mlp(lambda m, x: m.down(act(m.gate(x)) * m.up(x)))


def packed(act: Callable[[torch.Tensor], torch.Tensor]) -> Mlp:
    def code(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = m.gate_up(x).chunk(2, dim=-1)
        return m.down(act(gate) * up)

    return mlp(code, gate_up=2 * INNER)


def plain(act: Callable[[torch.Tensor], torch.Tensor]) -> Mlp:
    return mlp(lambda m, x: x + m.down(act(m.fc(x))), fc=INNER)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from([(gated, ("gate", "up")), (packed, ("gate_up",)), (plain, ("fc",))]),
    act=st.sampled_from(sorted(Activation)),
    seed=st.integers(0, 1 << 20),
    meta=st.booleans(),
)
def test_elementwise_modules_qualify(form: Any, act: str, seed: int, meta: bool) -> None:
    make, expected = form
    module = make(Activation[act])
    module = module.to("meta") if meta else module
    assert producers_of(module, "down", seed=seed) == expected
    assert all(producers_of(module, name, seed=seed) == () for name in expected)


def _reused(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate = functional.silu(m.gate(x))
    return m.down(gate * m.up(x)) + gate.mean(-1, keepdim=True)


def _returned(m: Any, x: torch.Tensor) -> Any:
    gate = m.gate(x)
    return m.down(gate * m.up(x)), gate


def _read_by_another(m: Any, x: torch.Tensor) -> torch.Tensor:
    inner = m.gate(x) * m.up(x)
    return m.down(inner) + m.second(inner)


def _interleaved(m: Any, x: torch.Tensor) -> torch.Tensor:
    both = m.gate_up(x)
    return m.down(both[..., ::2] * both[..., 1::2])


def _halves_swapped(m: Any, x: torch.Tensor) -> torch.Tensor:
    left, right = (m.gate(x) * m.up(x)).chunk(2, dim=-1)
    return m.down(torch.cat([right, left], dim=-1))


def _attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (one(x).unflatten(-1, (4, -1)).transpose(-2, -3) for one in (m.query, m.key, m.value))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return m.down(mixed.transpose(-2, -3).flatten(-2))


def _from_a_list(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(m.gate(x) * functional.linear(x, m.up.weight))


GATES = {"gate": INNER, "up": INNER}
IMPOSTORS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], dict[str, int]]] = {
    "softmax over channels": (lambda m, x: m.down(m.gate(x).softmax(-1) * m.up(x)), GATES),
    "norm over channels": (lambda m, x: m.down(functional.rms_norm(m.up(x), (INNER,))), GATES),
    "rolled channels": (lambda m, x: m.down(m.gate(x).roll(1, -1) * m.up(x)), GATES),
    "halves swapped": (_halves_swapped, GATES),
    "a gain of each channel": (lambda m, x: m.down(m.gains * m.gate(x) * m.up(x)), GATES),
    "gate used again": (_reused, GATES),
    "gate returned": (_returned, GATES),
    "read by another linear": (_read_by_another, {**GATES, "second": HIDDEN}),
    "interleaved": (_interleaved, {"gate_up": 2 * INNER}),
    "attention": (_attention, {"query": INNER, "key": INNER, "value": INNER}),
    "a weight read as it is": (_from_a_list, GATES),
    "down called twice": (lambda m, x: m.down(m.gate(x)) + m.down(m.up(x)), GATES),
    "not called": (lambda m, x: m.gate(x), GATES),
    "raises": (lambda m, x: m.down(m.gate(x) * m.missing), GATES),
    "asks for more": (lambda m, x: m.down(m.gate(x["hidden"])), GATES),
    "random": (lambda m, x: m.down(functional.dropout(m.gate(x)) * m.up(x)), GATES),
    "reads its own input": (lambda m, x: m.down(m.fc(x) * x.repeat(1, 1, 2)), {"fc": 2 * HIDDEN}),
}


@pytest.mark.parametrize("name", IMPOSTORS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_others_keep_their_order(name: str, seed: int) -> None:
    code, outputs = IMPOSTORS[name]
    module = mlp(code, **outputs)
    if name == "reads its own input":
        module.down = nn.Linear(2 * HIDDEN, HIDDEN)
    assert producers_of(module, "down", seed=seed) == ()


def test_the_module_is_as_before() -> None:
    module = gated(functional.silu)
    parts, x = dict(module.named_modules()), torch.randn(2, HIDDEN)
    expected = module(x)
    producers_of(module, "down")
    assert dict(module.named_modules()) == parts
    assert torch.equal(module(x), expected)


def test_each_linear_of_a_chain_feeds_the_next() -> None:
    module = mlp(lambda m, x: m.out(m.down(m.fc(x).relu()).relu()), fc=INNER)
    module.out = nn.Linear(HIDDEN, HIDDEN)
    assert producers_of(module, "down") == ("fc",)
    assert producers_of(module, "out") == ("down",)
    assert producers_of(module, "fc") == ()


class Model(nn.Module):
    """A decoder of two layers, the least that runs over samples."""

    def __init__(self, *, peeks: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, HIDDEN)
        self.mlp, self.other = gated(functional.silu), gated(functional.silu)
        self.peeks = peeks

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.embed(input_ids)
        x = self.mlp(x) + self.other(x)
        return x + self.other.gate(x).mean() if self.peeks else x


def test_a_linear_that_is_called_from_outside_is_left_alone() -> None:
    readers, sample = ["mlp.down", "other.down", "mlp.gate"], torch.arange(6)
    mine = Feed("mlp.down", ("mlp.gate", "mlp.up"))
    whole = find_feeds(Model(peeks=False).eval(), readers, sample)
    assert whole == [mine, Feed("other.down", ("other.gate", "other.up"))]
    assert find_feeds(Model(peeks=True).eval(), readers, sample) == [mine]
