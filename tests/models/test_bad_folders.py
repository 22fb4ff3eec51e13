"""A model folder that is not what it should be is refused in words that say what to mend."""

from __future__ import annotations

import json
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest
from nmexport.errors import ModelError
from nmexport.json_reader import parse_json
from nmexport.models.guard import unused_code
from nmexport.models.loader import load_model, load_tokenizer
from nmexport.models.skeleton import skeleton
from nmexport.models.source import ModelSource, resolve
from nmexport.recipe import ModelSection

from tests.support.tiny import EMPTY_GGUF

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Change = Callable[[Path], object]

WHOLE, CONFIG = "model.safetensors", "config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 494944\n"
DEEP = "[" * 100_000


def source_of(folder: Path, *, trusted: bool = False) -> ModelSource:
    return resolve(ModelSection(id=str(folder), trust_remote_code=trusted))


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def config(**values: Any) -> Change:
    """Change keys of the configuration."""

    def change(folder: Path) -> None:
        document = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**document, **values}))

    return change


def content(name: str, data: bytes | str) -> Change:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(
        data if isinstance(data, bytes) else data.encode()
    )


def entry(**values: Any) -> Change:
    """Change what the header says of one tensor, and nothing of its bytes."""

    def change(folder: Path) -> None:
        data = (folder / WHOLE).read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        header["model.norm.weight"].update(values)
        text = json.dumps(header).encode()
        (folder / WHOLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


def rename(name: str) -> Change:
    return lambda folder: (folder / WHOLE).rename(folder / name)


# What is done to the folder, words of the problem, words of the way on.
FOLDERS: dict[str, tuple[Change, str, str]] = {
    "pointer": (content(WHOLE, POINTER), f"{WHOLE} is a pointer of Git LFS", "git lfs pull"),
    "pointer_json": (content(CONFIG, POINTER), f"{CONFIG} is a pointer of Git LFS", "git lfs"),
    "page": (content(WHOLE, "<!DOCTYPE html>"), "header cannot be read", "download or copy"),
    "negative": (entry(shape=[-64]), "of shape [-64] in F32 cannot fill 256 bytes", "download"),
    "narrow": (entry(shape=[32]), "of shape [32] in F32 cannot fill 256 bytes", "download"),
    "other_type": (entry(dtype="BF16"), "in BF16 cannot fill 256 bytes", "download"),
    "one_offset": (entry(data_offsets=[5]), "header cannot be read", "download"),
    "deep_header": (
        content(WHOLE, struct.pack("<Q", len(DEEP)) + DEEP.encode()),
        "nested too deeply",
        "download",
    ),
    "deep_config": (content(CONFIG, DEEP), "nested too deeply", ""),
    "marked_config": (content(CONFIG, "\ufeff{}"), "begins with a byte-order mark", ""),
    "no_layers": (config(num_hidden_layers=0), "num_hidden_layers cannot be 0", "config.json"),
    "no_heads": (config(num_attention_heads=0), "num_attention_heads cannot be 0", "config.json"),
    "negative_size": (config(hidden_size=-64), "hidden_size cannot be -64", "config.json"),
    "no_window": (config(sliding_window=0), "sliding_window cannot be 0", "config.json"),
    "nested_size": (
        config(text_config={"vocab_size": 0}), "vocab_size cannot be 0", "config.json"
    ),
    "misnamed": (rename("weights.safetensors"), "holds weights.safetensors", f"call it {WHOLE}"),
    "capital": (rename("Model.safetensors"), "holds Model.safetensors", f"call it {WHOLE}"),
    "adapter": (
        content("adapter_model.safetensors", b""),
        "an adapter (adapter_model.safetensors) next to a whole model",
        "merge it",
    ),
    "adapter_pickle": (content("adapter_model.bin", b""), "an adapter (adapter_model.bin)", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_refused_when_it_is_found(folder: Path, case: str) -> None:
    change, said, fix = FOLDERS[case]
    change(folder)
    with pytest.raises(ModelError) as caught:
        source_of(folder)
    assert said in caught.value.problem
    assert fix in (caught.value.fix or "")
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize("version", [struct.pack("<I", 1), struct.pack(">I", 3)])
def test_a_gguf_of_another_version_is_called_one(version: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(EMPTY_GGUF[:4] + version + EMPTY_GGUF[8:])
    with pytest.raises(ModelError, match=r"m\.gguf is a GGUF of version \d+") as caught:
        source_of(path)
    assert "versions 2 and 3" in str(caught.value.allowed)


def test_a_gguf_of_an_unknown_architecture_is_no_fault_of_its_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(EMPTY_GGUF)
    with pytest.raises(ModelError, match=r"Model .*m\.gguf' cannot be loaded from"):
        load_tokenizer(source_of(path))


CONFIGURATIONS: dict[str, tuple[Change, str]] = {
    "activation": (config(hidden_act="swiglu9"), "hidden_act is 'swiglu9' in its config"),
    "rope": (
        config(rope_parameters={"rope_type": "zigzag", "rope_theta": 1e4}),
        "rope_parameters.rope_type is 'zigzag' in its config",
    ),
    "text_for_number": (config(hidden_size="64"), "'hidden_size' expected int, got str"),
    "heads": (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_what_transformers_trips_over_is_named(folder: Path, case: str) -> None:
    change, said = CONFIGURATIONS[case]
    change(folder)
    with pytest.raises(ModelError) as caught:
        skeleton(source_of(folder))
    assert said in caught.value.problem
    assert "\n" not in caught.value.problem


def test_a_window_that_is_switched_off_may_be_anything(folder: Path) -> None:
    config(use_sliding_window=False, sliding_window=0)(folder)
    assert source_of(folder)


def test_an_empty_section_of_quantisation_says_nothing(folder: Path, tiny_llama: Path) -> None:
    config(quantization_config={})(folder)
    loaded = load_model(source_of(folder)).state_dict()
    for name, value in load_model(source_of(tiny_llama)).state_dict().items():
        assert (loaded[name] == value).all(), name


def test_code_beside_a_known_type_is_told_not_run(folder: Path) -> None:
    assert unused_code(source_of(folder)) is None
    config(auto_map={"AutoModelForCausalLM": "modeling_own.Own"})(folder)
    note = unused_code(source_of(folder))
    assert note is not None
    assert "auto_map" in note
    assert "'llama'" in note
    assert "--trust-remote-code" in note
    assert unused_code(source_of(folder, trusted=True)) is None
    assert type(skeleton(source_of(folder))).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("text", [DEEP, DEEP.encode(), "\ufeff{}", "{", "9" * 5000, b"\xff"])
def test_whatever_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_json_is_parsed() -> None:
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    assert parse_json('{"a": 1, "a": 2}', make_object=list) == [("a", 1), ("a", 2)]
