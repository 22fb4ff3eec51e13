"""On a GPU: what is folded there, or from a model spread over several, is what a CPU folds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.models.offload import Memory
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, Remainder
from nmexport.sparsity.pattern import NMPattern

from tests.models.test_layerwise import built

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def test_weights_on_a_gpu_meet_constants_on_the_host() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    constants = Constants(
        shift=torch.randn(64),
        score_scale=torch.rand(64),
        channel_order=torch.randperm(64).int(),
        nu=1.1,
        remainder=Remainder(torch.randn(64, 4), torch.randn(4, 32)),
    )
    behaviour = Behaviour(pattern=NMPattern(8, 16))
    expected = fold(linear, behaviour, constants, dtype=torch.float32)
    found = fold(linear.cuda(), behaviour, constants, dtype=torch.float32)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_spread_over_all_gpus_is_folded_as_on_the_host(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40, "utf-8")
    # Constants that follow from the weights alone: sums of activations have other last bits.
    plain = {"sparsity.mitigations": ["r-sparse"], "sparsity.grouping": "consecutive"}
    expected = built(tiny_llama, tmp_path / "host", text, **plain)
    gpus = min(torch.cuda.device_count(), 2)
    memory = Memory(host=100_000, devices=(1_000_000 // gpus,) * gpus)
    monkeypatch.setattr("nmexport.models.offload.free_memory", lambda: memory)
    found = built(tiny_llama, tmp_path / "gpus", text, **plain)
    name = "model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()
