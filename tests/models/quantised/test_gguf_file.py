"""A quantised `.gguf`: its integers are kept beside the model that transformers dequantises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from gguf import GGUFReader
from nmexport.errors import ModelError
from nmexport.models import unpacked
from nmexport.models.loader import load_model
from nmexport.models.quantised.gguf_blocks import gguf_weight
from nmexport.models.quantised.gguf_file import GgufIntegers
from nmexport.models.source import ModelSource, resolve
from nmexport.models.weights import WeightTable
from nmexport.progress import Silent
from nmexport.recipe import ModelSection

from tests.support.tiny import save_tiny_model
from tests.support.tiny_gguf import save_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path

MIXED = {
    "layers.0.self_attn": "Q4_1",
    "layers.1.self_attn": "Q8_0",
    "gate_proj": "Q4_0",
    "up_proj": "Q5_1",
    "down_proj": "Q5_0",
    "lm_head": "Q8_0",
    "embed_tokens": "Q4_1",
}


@pytest.fixture
def opened(tiny_llama: Path, tmp_path: Path) -> ModelSource:
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", types=MIXED)
    source = resolve(ModelSection(id=str(tmp_path / "m.gguf")))
    return unpacked.unpack(source, tmp_path / "work", Silent())


def table_of(source: ModelSource) -> tuple[Any, WeightTable]:
    model = load_model(source)
    return model, WeightTable(model, source.weights_folder)


def test_every_matrix_stays_in_its_integers(opened: ModelSource) -> None:
    model, table = table_of(opened)
    types = {"Q4_1": "uint4", "Q8_0": "int8", "Q4_0": "int4", "Q5_1": "int8", "Q5_0": "int8"}
    for name, parameter in model.named_parameters():
        kept = table.quantised(name)
        kind = next((kind for part, kind in MIXED.items() if part in name), None)
        if parameter.ndim < 2:
            assert kept is None, name
            continue
        assert kept is not None, name
        assert kept.type == types[str(kind)], name
        torch.testing.assert_close(kept.dequantised().t(), parameter, rtol=0, atol=1e-6)


def test_integers_are_those_of_the_file(opened: ModelSource) -> None:
    """And rows of q lie in the order in which transformers has them."""
    _, table = table_of(opened)
    tensors = {tensor.name: tensor for tensor in GGUFReader(opened.folder / "m.gguf").tensors}
    down = table.quantised("model.layers.1.mlp.down_proj.weight")
    stored = gguf_weight(tensors["blk.1.ffn_down.weight"].data, "Q5_0")
    assert down is not None
    assert torch.equal(down.values, stored.values)
    assert torch.equal(down.scale, stored.scale)
    query = table.quantised("model.layers.1.self_attn.q_proj.weight")
    stored = gguf_weight(tensors["blk.1.attn_q.weight"].data, "Q8_0")
    rows = torch.arange(64).reshape(4, 8, 2).swapaxes(1, 2).flatten()
    assert query is not None
    assert not torch.equal(query.values, stored.values)
    assert torch.equal(query.values, stored.values[:, rows])


def test_what_is_kept_is_counted(opened: ModelSource) -> None:
    _, table = table_of(opened)
    assert table.kept is not None
    assert {(kind.form, kind.tensors) for kind in table.kept.kinds} == {
        ("Q4_1", 5),
        ("Q8_0", 5),
        ("Q4_0", 2),
        ("Q5_1", 2),
        ("Q5_0", 2),
    }
    assert "GGUF: weights kept as they are stored: 2 in Q4_0" in table.kept.sentence()


def test_a_tied_head_shares_the_integers_of_the_embedding(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    save_tiny_gguf(tmp_path / "tied", tmp_path / "m.gguf", types={"embed_tokens": "Q8_0"})
    source = resolve(ModelSection(id=str(tmp_path / "m.gguf")))
    _, table = table_of(unpacked.unpack(source, tmp_path / "work", Silent()))
    head = table.quantised("lm_head.weight")
    embedding = table.quantised("model.embed_tokens.weight")
    assert head is not None
    assert embedding is not None
    assert torch.equal(head.values, embedding.values)
    assert table.quantised("model.layers.0.mlp.up_proj.weight") is None


def test_floats_have_no_integers(tiny_llama: Path, tmp_path: Path) -> None:
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", types={"mlp": "F16"})
    source = resolve(ModelSection(id=str(tmp_path / "m.gguf")))
    _, table = table_of(unpacked.unpack(source, tmp_path / "work", Silent()))
    assert table.quantised("model.layers.0.mlp.up_proj.weight") is None
    assert table.kept is None


def test_a_record_that_cannot_be_read(opened: ModelSource) -> None:
    (opened.weights_folder / "integers.json").write_text("{}")
    with pytest.raises(ModelError, match=r"integers.json cannot be read"):
        GgufIntegers(opened.weights_folder)
