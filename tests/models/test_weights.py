"""Which tensors make a model: every parameter has one source, and all loaders agree on it."""

from __future__ import annotations

import json
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.errors import ModelError
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.skeleton import skeleton
from nmexport.models.source import ModelSource, resolve
from nmexport.models.streaming import open_for_export
from nmexport.models.weights import WeightTable
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from safetensors.torch import load_file, save_file

from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def source_of(folder: Path) -> ModelSource:
    return resolve(ModelSection(id=str(folder)))


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model whose files a test changes."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def split(folder: Path, *, keep_whole: bool = False) -> dict[str, str]:
    """Put the tensors into two shards with an index; returns its map."""
    tensors = load_file(folder / WHOLE)
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    placed = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    if not keep_whole:
        (folder / WHOLE).unlink()
    return placed


def refusals(source: ModelSource) -> set[str]:
    """What loading whole, layer by layer and for export say, without the fix."""
    told = set()
    for load in (
        lambda: load_model(source),
        lambda: LayerwiseModel(source),
        lambda: open_for_export(source, dtype=torch.float32),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        told.add(str(caught.value))
    return told


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits[0]
    return found


def assert_all_loaders_agree(folder: Path) -> None:
    """Whole, layer by layer and for export: the model that transformers loads."""
    from transformers import AutoModelForCausalLM

    source = source_of(folder)
    ids = torch.arange(3, 19)[None]
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = logits(original, ids)
    assert torch.equal(logits(load_model(source), ids), expected)
    seen: list[torch.Tensor] = []
    LayerwiseModel(source).run(
        ids,
        progress=Silent(),
        label="",
        logits_kept=0,
        use_logits=lambda _, found: seen.append(found.clone()),
    )
    torch.testing.assert_close(seen[0], expected)
    opened = open_for_export(source, dtype=torch.float32)
    assert opened.streamed
    for name, parameter in original.named_parameters(remove_duplicate=False):
        assert torch.equal(opened.parameter(name), parameter), name
    buffers = dict(opened.model.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffers[name], buffer), name


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "phi3", "olmo", "bloom"])
def test_all_loaders_agree(family: str, head: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family, tie_word_embeddings=head == "tied")
    if family in {"bloom", "gpt2"} and head == "untied":
        pytest.skip("always tied")
    source = source_of(tmp_path)
    table = WeightTable(skeleton(source), tmp_path)
    names = {name for name, _ in skeleton(source).named_parameters(remove_duplicate=False)}
    assert names <= set(table.names)
    if not hasattr(skeleton(source).get_decoder(), "layers"):
        pytest.skip("has no list of layers to run one by one")
    assert_all_loaders_agree(tmp_path)


def test_shards_with_an_index(folder: Path) -> None:
    split(folder)
    assert_all_loaders_agree(folder)


def test_a_renamed_head_is_found(tmp_path: Path) -> None:
    """GPT-NeoX stores `embed_out`, which transformers calls `lm_head`."""
    save_tiny_model(tmp_path, "gpt_neox", tie_word_embeddings=False)
    tensors = load_file(tmp_path / WHOLE)
    assert "embed_out.weight" in tensors
    assert not torch.equal(tensors["embed_out.weight"], tensors["gpt_neox.embed_in.weight"])
    table = WeightTable(skeleton(source_of(tmp_path)), tmp_path)
    assert table.sources("lm_head.weight") == ["embed_out.weight"]
    assert torch.equal(table.read("lm_head.weight"), tensors["embed_out.weight"])


def test_a_stored_buffer_is_read(tmp_path: Path) -> None:
    """Apertus keeps constants of its activation as buffers in the files."""
    save_tiny_model(tmp_path, "apertus")
    change_tensors(tmp_path, lambda all_: all_["model.layers.0.mlp.act_fn.beta"].fill_(0.75))
    assert_all_loaders_agree(tmp_path)
    model = LayerwiseModel(source_of(tmp_path)).model
    assert dict(model.named_buffers())["model.layers.0.mlp.act_fn.beta"] == 0.75


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda all_: all_.pop("lm_head.weight"), "hold no lm_head.weight"),
        (lambda all_: all_.pop(UP), f"hold no {UP}"),
        (lambda all_: all_.update({UP.replace("up_", "upper_"): all_.pop(UP)}), "upper_proj"),
        (lambda all_: all_.update(extra=torch.ones(3)), "hold extra, which"),
        (lambda all_: all_.update({UP: torch.ones(3, 4)}), r"up_proj.weight \[3, 4\]"),
        (lambda all_: all_.update({UP: all_[UP].to(torch.int8)}), "quantised .*stored as I8"),
        (
            lambda all_: all_.update({UP.removeprefix("model."): all_[UP].clone()}),
            "up_proj.weight has 2 sources",
        ),
        (
            lambda all_: all_.update({"model.embed_tokens.weight": torch.ones(400, 64)}),
            "vocab_size and hidden_size",
        ),
    ],
    ids=["head", "mlp", "renamed", "extra", "shape", "integers", "two sources", "vocabulary"],
)
def test_files_that_do_not_make_the_model(
    change: Callable[[dict[str, torch.Tensor]], Any], told: str, folder: Path
) -> None:
    change_tensors(folder, change)
    said = refusals(source_of(folder))
    assert len(said) == 1, "all loaders say the same"
    with pytest.raises(ModelError, match=told):
        load_model(source_of(folder))


def test_a_missing_head_says_how_to_tie(folder: Path) -> None:
    change_tensors(folder, lambda all_: all_.pop("lm_head.weight"))
    with pytest.raises(ModelError, match="set tie_word_embeddings to true"):
        load_model(source_of(folder))


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers(layers: int, folder: Path) -> None:
    change_config(folder, num_hidden_layers=layers)
    for told in refusals(source_of(folder)):
        assert f"model.layers.{1 if layers == 1 else 2}." in told


def test_a_tie_that_the_files_contradict(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    for told in refusals(source_of(folder)):
        assert "tie_word_embeddings" in told
    change_tensors(
        folder,
        lambda all_: all_.update({"lm_head.weight": all_["model.embed_tokens.weight"].clone()}),
    )
    assert_all_loaders_agree(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, folder: Path) -> None:
    change_tensors(folder, lambda all_: all_[UP][3].fill_(value))
    source = source_of(folder)
    with pytest.raises(ModelError, match=f"{UP} of .* NaN or infinite"):
        load_model(source)
    opened = open_for_export(source, dtype=torch.float32)
    with pytest.raises(ModelError, match="NaN or infinite"):
        opened.parameter(UP)
    with pytest.raises(ModelError, match="NaN or infinite"):
        LayerwiseModel(source).run(torch.arange(3, 9)[None], progress=Silent(), label="")


def test_weights_beyond_float16(folder: Path) -> None:
    change_tensors(folder, lambda all_: all_[UP][3].fill_(1e6))
    source = source_of(folder)
    load_model(source)
    with pytest.raises(ModelError, match="float16 ends at 65504"):
        load_model(source, dtype="float16")
    opened = open_for_export(source, dtype=torch.float16)
    with pytest.raises(ModelError, match="float16 ends at 65504"):
        opened.parameter(UP)


# -- files that contradict each other, seen by their headers when the model is looked for ---------


def refused(folder: Path, told: str) -> str:
    with pytest.raises(ModelError, match=told) as caught:
        source_of(folder)
    return str(caught.value)


def test_an_index_with_its_shards_beside_a_whole_file(folder: Path) -> None:
    split(folder, keep_whole=True)
    assert "remove" in refused(folder, "holds two models")


def test_an_index_left_over_without_its_shards(folder: Path) -> None:
    for file in set(split(folder, keep_whole=True).values()):
        (folder / file).unlink()
    assert_all_loaders_agree(folder)


def test_an_index_of_one_whole_file(folder: Path) -> None:
    names = load_file(folder / WHOLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WHOLE)}))
    assert_all_loaders_agree(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    placed = split(folder)
    first, second = sorted(set(placed.values()))
    tensors = load_file(folder / second)
    name = next(name for name in placed if placed[name] == first)
    tensors[name] = torch.zeros(4)
    save_file(tensors, folder / second)
    refused(folder, f"{name} is stored twice, in {first} and in {second}")


def test_an_index_that_names_what_its_shards_lack(folder: Path) -> None:
    placed = split(folder)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {**placed, "ghost": next(iter(placed.values()))}})
    )
    refused(folder, "places ghost in shards that do not hold it")


def test_an_index_that_swaps_shards(folder: Path) -> None:
    placed = split(folder)
    first, second = sorted(set(placed.values()))
    swapped = {name: second if file == first else first for name, file in placed.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": swapped}))
    refused(folder, "in shards that do not hold them")


def test_shards_that_hold_what_the_index_does_not_list(folder: Path) -> None:
    placed = split(folder)
    name = min(placed)
    del placed[name]
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))
    refused(folder, f"hold {name}, which it does not list")


def test_a_truncated_shard(folder: Path) -> None:
    path = folder / sorted(set(split(folder).values()))[1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "damaged or incomplete")


def test_shards_without_an_index(folder: Path) -> None:
    split(folder)
    (folder / INDEX).unlink()
    refused(folder, "holds shards .* and no model.safetensors.index.json")


def test_an_index_that_leads_elsewhere(folder: Path) -> None:
    placed = split(folder)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(placed, "../x.safetensors")})
    )
    refused(folder, "names the weights '../x.safetensors'")


def test_a_config_that_names_the_weights(folder: Path) -> None:
    """Transformers follows `transformers_weights`; so do all loaders here."""
    (folder / WHOLE).rename(folder / "other.safetensors")
    save_file({"x": torch.ones(1)}, folder / WHOLE)
    change_config(folder, transformers_weights="other.safetensors")
    assert_all_loaders_agree(folder)
    change_config(folder, transformers_weights="../other.safetensors")
    refused(folder, "names the weights")


# -- kinds of checkpoints that are not taken ------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "brand_new"}, "brand_new"),
        ({"something": 1}, "a method that its config does not name"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_checkpoints(
    section: dict[str, Any], told: str, nested: bool, folder: Path
) -> None:
    change = {"quantization_config": section}
    change_config(folder, **({"text_config": change} if nested else change))
    assert "float32, float16 or bfloat16" in refused(folder, f"is quantised .*{told}")


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_a_configuration_of_quantised_weights_and_none_of_them(method: str, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    told = refused(folder, "says that it is quantised .*, and holds no weights that are")
    assert "remove quantization_config" in told


def test_what_a_checkpoint_was_quantised_from(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "hqq"})
    named = folder.rename(folder.with_name("Llama-3-8B-4bit"))
    assert refused(named, "hqq").endswith("quantised from: Llama-3-8B")
    (named / "README.md").write_text("---\nbase_model: meta/Llama-3-8B\n---\n")
    assert refused(named, "hqq").endswith("quantised from: meta/Llama-3-8B")


@pytest.mark.parametrize(
    ("name", "dtype", "told"),
    [
        ("weight_scale_inv", torch.float32, "FP8"),
        ("qweight", torch.int32, "GPTQ or AWQ"),
        ("weight_packed", torch.int32, "compressed-tensors"),
        ("SCB", torch.float32, "bitsandbytes"),
        ("weight.absmax", torch.float32, "bitsandbytes"),
        ("weight", torch.float8_e4m3fn, "FP8"),
    ],
)
def test_quantised_tensors_that_no_config_tells_of(
    name: str, dtype: torch.dtype, told: str, folder: Path
) -> None:
    base = UP.removesuffix("weight")
    change_tensors(folder, lambda all_: all_.update({base + name: torch.ones(128, 64).to(dtype)}))
    refused(folder, f"is quantised .*{told}.*{base}{name}")


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter(whole: bool, folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/base"}')
    if not whole:
        (folder / "config.json").unlink()
    told = refused(folder, "holds an adapter .*of meta/base")
    assert "merge_and_unload" in told
    assert ("next to a whole model" in told) == whole


def gguf(metadata: dict[str, int], tensors: dict[str, tuple[int, ...]], size: int) -> bytes:
    """A GGUF of float32 tensors, its numbers of metadata as 32 bits, and `size` bytes of data."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for name, value in metadata.items():
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<II", 4, value)
    offset = 0
    for name, shape in tensors.items():
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", 0, offset)
        offset += 4 * torch.Size(shape).numel()
    return out + bytes(-len(out) % 32) + bytes(size)


def write_parts(folder: Path, *metadata: dict[str, int]) -> list[Path]:
    """A split GGUF with a tensor a part."""
    paths = [folder / f"m-{i + 1:05d}-of-{len(metadata):05d}.gguf" for i in range(len(metadata))]
    for index, (path, entries) in enumerate(zip(paths, metadata, strict=True)):
        path.write_bytes(gguf(entries, {f"t{index}": (4, 2)}, 32))
    return paths


def test_a_split_gguf_is_found_by_any_of_its_parts(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, *({"split.no": i, "split.count": 2} for i in range(2)))
    sources = [source_of(path) for path in parts]
    assert [source.gguf_files for source in sources] == [tuple(parts)] * 2
    assert sources[0].digest == sources[1].digest
    parts[1].write_bytes(gguf({"split.no": 1, "split.count": 2}, {"t1": (4, 2)}, 32) + b"x")
    assert source_of(parts[0]).digest != sources[0].digest  # the other part is of the model too


@pytest.mark.parametrize("number", [0, 1])
def test_an_incomplete_split_gguf(number: int, tmp_path: Path) -> None:
    parts = write_parts(tmp_path, *({"split.no": i, "split.count": 2} for i in range(2)))
    parts[1 - number].unlink()
    told = refused(parts[number], f"is part {number + 1} of 2 of a split GGUF, and")
    assert f"{parts[1 - number].name} is not there" in told
    renamed = tmp_path / "m.gguf"
    parts[number].rename(renamed)
    refused(renamed, "its name does not say so")


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ({"split.tensors.count": 2}, {"split.no": 0}, "it is no part 2 of 2"),
        ({"split.tensors.count": 2}, {"split.count": 3}, "it is no part 2 of 2"),
        ({"split.tensors.count": 5}, {}, "its header says 5: they are not of one model"),
    ],
)
def test_parts_of_several_models(
    first: dict[str, int], second: dict[str, int], says: str, tmp_path: Path
) -> None:
    parts = write_parts(
        tmp_path,
        {"split.no": 0, "split.count": 2, **first},
        {"split.no": 1, "split.count": 2, **second},
    )
    refused(parts[0], says)


def test_a_truncated_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"x": 1}, {"a": (4, 2), "b": (8,)}, 64))
    assert source_of(path).gguf_file == "m.gguf"
    path.write_bytes(gguf({"x": 1}, {"a": (4, 2), "b": (8,)}, 60))
    refused(path, "damaged or incomplete: it has")
    path.write_bytes(gguf({"x": 1}, {"a": (4, 2), "b": (8,)}, 64)[:50])
    refused(path, "header cannot be read")


def test_a_gguf_in_upper_case(tmp_path: Path) -> None:
    path = tmp_path / "X.GGUF"
    path.write_bytes(gguf({}, {}, 0))
    assert source_of(path).gguf_file == "X.GGUF"


def test_a_folder_with_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "X.GGUF").write_bytes(gguf({}, {}, 0))
    refused(tmp_path, f"name the file: {tmp_path / 'X.GGUF'}")


def test_remote_code_names_our_option(folder: Path) -> None:
    change_config(
        folder,
        model_type="homemade",
        auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"},
    )
    (folder / "mine.py").write_text("raise RuntimeError('ran')\n")
    for told in refusals(source_of(folder)):
        assert "mine.py" in told
        assert "--trust-remote-code" in told
        assert "model.trust_remote_code: true" in told
