"""The rival's decoder computes what a decoder computes; its weights have the sizes that it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.bench.rivals import torch_compile
from nmexport.bench.rivals.interface import Case
from nmexport.bench.rivals.shapes import Shapes, read_shapes
from nmexport.bench.rivals.torch_compile import TorchCompiled, TorchSetting
from nmexport.bench.rivals.torch_decoder import Decoder, DenseLinear, Int8Linear
from nmexport.errors import ArtifactError
from nmexport.progress import Silent

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = Shapes(
    hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=128, layers=2, vocabulary=384
)
KINDS = {"dense": DenseLinear, "int8": Int8Linear}


def decoder(kind: str, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)

    def linear(rows: int, columns: int) -> torch.nn.Module:
        return KINDS[kind](rows, columns, device="cpu", dtype=dtype)

    return Decoder(SHAPES, linear, device="cpu", dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_a_cache_give_the_whole_prompts_logits(kind: str) -> None:
    model, ids = decoder(kind), torch.randint(SHAPES.vocabulary, (2, 20))
    with torch.no_grad():
        model.allocate(2, 24)
        whole = model.logits(ids, torch.arange(20))
        model.allocate(2, 24)
        model.logits(ids[:, :10], torch.arange(10))
        for place in range(10, 20):
            last = model.logits(ids[:, place : place + 1], torch.tensor([place]))
            token = model(ids[:, place : place + 1], torch.tensor([place]))
    torch.testing.assert_close(last, whole, atol=1e-5, rtol=0)
    assert 0.5 < whole.std() < 2, "weights of another size would overflow half types"
    assert token.tolist() == whole.argmax(-1).tolist()


def test_a_token_attends_to_all_before_it_and_to_none_behind() -> None:
    model, ids = decoder("dense"), torch.randint(SHAPES.vocabulary, (1, 9))
    with torch.no_grad():
        model.allocate(1, 16)
        model.logits(ids, torch.arange(9))
        before = model.logits(ids[:, :1], torch.tensor([8]))
        for block in model.blocks:
            block.keys[:, :, 9:], block.values[:, :, 9:] = 7.0, 7.0
        assert torch.equal(model.logits(ids[:, :1], torch.tensor([8])), before)
        model.blocks[0].values[:, :, 0] = 7.0
        assert not torch.equal(model.logits(ids[:, :1], torch.tensor([8])), before)


def test_integers_and_scales_are_the_weights() -> None:
    linear = Int8Linear(32, 48, device="cpu", dtype=torch.float32)
    x = torch.randn(3, 32)
    wanted = x @ (linear.weight.float() * linear.scale[:, None]).T
    torch.testing.assert_close(linear(x), wanted)
    assert linear.weight.dtype == torch.int8


def test_the_whole_step_is_one_graph() -> None:
    model = decoder("dense")
    model.allocate(2, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    ids, positions = torch.randint(SHAPES.vocabulary, (2, 1)), torch.tensor([15])
    with torch.no_grad():
        assert compiled(ids, positions).tolist() == model(ids, positions).tolist()


@pytest.mark.parametrize("weights", torch_compile.WEIGHTS)
def test_weights_take_the_memory_that_the_entry_says(weights: Any) -> None:
    entry = torch_compile.entry(weights, setting())
    model = decoder(weights, torch.bfloat16)
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    scales = sum(b.nbytes for name, b in model.named_buffers() if name.endswith("scale"))
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert entry.weight_bytes == held - norms - scales
    assert (entry.is_rival, entry.is_dense) == (True, weights == "dense")


def setting(**changes: Any) -> TorchSetting:
    settings = {"shapes": SHAPES, "device": "cpu", "dtype": torch.bfloat16, "progress": Silent()}
    return TorchSetting(**(settings | changes))


def test_a_rival_runs_the_case_that_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], list[int], int]] = []
    plain = Decoder.forward

    def forward(self: Decoder, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append((list(ids.shape), positions.tolist(), self.blocks[0].keys.shape[2]))
        return plain(self, ids, positions)

    monkeypatch.setattr(Decoder, "forward", forward)
    with TorchCompiled("dense", setting()) as rival:
        for case in (
            Case(phase="decode", batch=3, tokens=21),
            Case(phase="prefill", batch=1, tokens=5),
        ):
            step = rival.prepare(case)
            assert step is not None
            step.run()
            assert step.device_ms(2) is None, "there is no device here"
            rival.release()
    assert asked == [([3, 1], [20], 24), ([1, 5], [0, 1, 2, 3, 4], 8)]
    with TorchCompiled("int8", setting()) as rival:
        assert rival.prepare(Case(phase="prefill", batch=1, tokens=5)) is None


def test_shapes_are_read_from_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    assert read_shapes(tiny_llama) == SHAPES
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(ArtifactError, match="does not say the shapes"):
        read_shapes(tmp_path)
