"""A `.gguf`: every tensor is read or refused, and it is dequantised once for all stages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from nmexport.errors import ModelError
from nmexport.models import unpacked
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.source import ModelSource, resolve
from nmexport.models.streaming import open_for_export
from nmexport.progress import Silent
from nmexport.recipe import ModelSection

from tests.support.tiny_gguf import save_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.arange(3, 19)[None]


def source_of(path: Path) -> ModelSource:
    return resolve(ModelSection(id=str(path)))


@pytest.fixture
def path(tiny_llama: Path, tmp_path: Path) -> Path:
    save_tiny_gguf(tiny_llama, tmp_path / "tiny.GGUF")
    return tmp_path / "tiny.GGUF"


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = model(IDS).logits
    return made


def test_a_gguf_is_the_model_it_was_made_of(path: Path, tiny_llama: Path) -> None:
    expected = logits(load_model(source_of(tiny_llama)))
    torch.testing.assert_close(logits(load_model(source_of(path))), expected)


def test_a_missing_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", without=name)
    with pytest.raises(ModelError, match=f"holds no {name}"):
        load_model(source_of(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_a_tensor_that_transformers_passes_over(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    extra = {name: np.full(64, 2.0, np.float32)}
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", extra=extra)
    with pytest.raises(ModelError, match=f"holds {name}, which transformers does not read"):
        load_model(source_of(tmp_path / "m.gguf"))


def test_factors_of_one_do_no_harm(tiny_llama: Path, tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", extra=extra)
    load_model(source_of(tmp_path / "m.gguf"))


@pytest.mark.parametrize("number", [1, 3])
def test_a_split_gguf_is_the_model_it_was_made_of(
    number: int, tiny_llama: Path, tmp_path: Path
) -> None:
    save_tiny_gguf(tiny_llama, tmp_path / "tiny.gguf", parts=3)
    source = source_of(tmp_path / f"tiny-0000{number}-of-00003.gguf")
    expected = logits(load_model(source_of(tiny_llama)))
    torch.testing.assert_close(logits(load_model(source)), expected)
    opened = unpacked.unpack(source, tmp_path / "work", Silent())
    torch.testing.assert_close(logits(load_model(opened)), expected)
    assert unpacked.reuse(source, tmp_path / "work") == opened


def test_a_part_without_its_tensors(tiny_llama: Path, tmp_path: Path) -> None:
    """Not a word of the format forbids parts that hold less than they should together."""
    save_tiny_gguf(
        tiny_llama, tmp_path / "m.gguf", parts=2, without="model.layers.1.mlp.up_proj.weight"
    )
    source = source_of(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ModelError, match=r"holds no model.layers.1.mlp.up_proj.weight"):
        load_model(source)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "rope.scaling.type = linear"),
        ({"rope.scaling.factor": 4.0}, "rope.scaling.factor = 4.0"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = yarn"),
        ({"attention.key_length": 32.0}, "attention.key_length = 32.0"),
        ({"attention.scale": 1.0}, "attention.scale = 1.0"),
        ({"attention.sliding_window": 16.0}, "attention.sliding_window = 16.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"logit_scale": 0.25}, "logit_scale = 0.25"),
        ({"attention.causal": False}, "attention.causal = False"),
        ({"something.new": 2.0}, "something.new = 2.0"),
    ],
)
def test_metadata_that_transformers_passes_over(
    metadata: dict[str, str | float | bool], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ModelError, match=f"llama.{re.escape(says)}, which transformers"):
        load_model(source_of(tmp_path / "m.gguf"))


def test_metadata_that_say_what_is_done_anyway(tiny_llama: Path, tmp_path: Path) -> None:
    metadata: dict[str, str | float | bool] = {
        "rope.scaling.type": "none",
        "rope.scaling.original_context_length": 64.0,
        "rope.scale_linear": 1.0,
        "attention.key_length": 16.0,
        "attention.value_length": 16.0,
        "attention.scale": 0.25,
        "attention.causal": True,
        "expert_count": 0.0,
        "tensor_data_layout": "Meta AI original pth",
    }
    save_tiny_gguf(tiny_llama, tmp_path / "m.gguf", metadata=metadata)
    load_model(source_of(tmp_path / "m.gguf"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_dequantised_once(
    dtype: str,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    source = source_of(path)
    expected = logits(load_model(source, dtype=dtype))
    loads = []
    original = unpacked.load_gguf

    def load(*given: Any, **options: Any) -> Any:
        loads.append(given)
        return original(*given, **options)

    monkeypatch.setattr(unpacked, "load_gguf", load)
    for _ in range(2):
        opened = unpacked.unpack(source, tmp_path / "work", Silent())
        assert torch.equal(logits(load_model(opened, dtype=dtype)), expected)
    assert len(loads) == 1
    assert capfd.readouterr().err == ""
    assert opened.digest == source.digest
    assert open_for_export(opened, dtype=torch.float32).streamed
    LayerwiseModel(opened).run(IDS, progress=Silent(), label="")


def test_without_room_each_stage_reads_the_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    full = shutil._ntuple_diskusage(1, 1, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    source = source_of(path)
    assert unpacked.unpack(source, tmp_path, Silent()) == source


def test_other_models_stay_where_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    source = source_of(tiny_llama)
    assert unpacked.unpack(source, tmp_path, Silent()) is source
    assert not list(tmp_path.iterdir())
