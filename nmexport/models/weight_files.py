"""Lists the files of a model's weights, and the tensors in them; no torch needed.

A folder holds its weights in one way: one whole file, or shards with an index. Where it holds
both, nothing says which is meant, and nothing is mixed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nmexport.errors import ModelError
from nmexport.models.integrity import StoredTensor, check_safetensors, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_SHOWN = 3  # names that a message lists


def read_config(folder: Path) -> dict[str, object]:
    """Read `config.json`.

    Raises:
        ModelError: if it is missing, malformed, or names no model type.
    """
    path = folder / CONFIG
    if not path.is_file():
        packed = sorted(path.name for path in folder.glob("*.[gG][gG][uU][fF]"))
        raise ModelError(
            f"{folder} has no {CONFIG}.",
            allowed="a Hugging Face model folder: config.json, *.safetensors, tokenizer files",
            fix=f"name the file: {folder / packed[0]}" if packed else None,
        )
    document = read_json(path)
    if not isinstance(document, dict) or "model_type" not in document:
        raise ModelError(
            f"{path} names no model_type.", allowed="the config of a transformers model"
        )
    return document


def check_sizes(folder: Path) -> None:
    """Refuse sizes of zero, which transformers accepts or fails on, by family.

    Raises:
        ModelError: naming the key.
    """
    config = read_config(folder)
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        has_window = section.get("use_sliding_window", True)
        for name in (*_SIZES, *(["sliding_window"] if has_window else [])):
            size = section.get(name)
            if isinstance(size, int) and size < 1:
                raise ModelError(
                    f"{folder / CONFIG}: {name} cannot be {size}.",
                    allowed="a whole number from 1"
                    + (", or null for no window" if name == "sliding_window" else ""),
                    fix="use the config.json that belongs to these weights",
                )


def index_of(folder: Path) -> Path | None:
    """Find the index of the shards; None where one file holds all.

    Raises:
        ModelError: if the folder holds both.
    """
    named = read_config(folder).get("transformers_weights")
    if named is not None:
        path = _beside(folder / CONFIG, str(named))
        return path if path.name.endswith(".index.json") else None
    index, whole = folder / INDEX, folder / WHOLE
    if not index.is_file():
        return None
    if not whole.is_file():
        return index
    shards = [name for name in set(_weight_map(index).values()) if name != WHOLE]
    if not any((folder / name).is_file() for name in shards):
        return None  # the index is left over: only the whole file can be meant
    raise ModelError(
        f"{folder} holds two models: the file {WHOLE}, and the {len(shards)} shards that {INDEX} "
        "lists. Nothing says which is meant.",
        allowed=f"{WHOLE}, or {INDEX} with its shards",
        fix=f"remove {INDEX} and its shards, or remove {WHOLE}",
    )


def weight_files(folder: Path) -> list[Path]:
    """List the model's safetensors files, in order of name; all of them exist.

    Raises:
        ModelError: if some are missing, come as pickles only, or are two models.
    """
    index = index_of(folder)
    if index is None:
        paths = [folder / str(read_config(folder).get("transformers_weights") or WHOLE)]
    else:
        paths = sorted({_beside(index, name) for name in _weight_map(index).values()})
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise _missing(folder, missing)
    return paths


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """List every tensor of a model's files by name; each lies in one file, as the index says.

    Raises:
        ModelError: if files are missing or damaged, or they and the index contradict each other.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        for name, tensor in check_safetensors(path).items():
            if name in tensors:
                raise ModelError(
                    f"{name} is stored twice, in {tensors[name].file.name} and in {path.name} of "
                    f"{folder}: nothing says which is meant.",
                    fix="complete the download again, into an empty folder",
                )
            tensors[name] = tensor
    index = index_of(folder)
    if index is not None:
        _check_index(index, tensors)
    return tensors


def _check_index(index: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Compare the index with its shards."""
    placed = _weight_map(index)
    fix = "download or copy the whole folder again: index and shards belong to different models"
    absent = [
        name
        for name, file in placed.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if absent:
        raise ModelError(
            f"{index} places {shorten(absent)} in shards that do not hold "
            f"{'it' if len(absent) == 1 else 'them'}.",
            fix=fix,
        )
    unlisted = sorted(tensors.keys() - placed.keys())
    if unlisted:
        raise ModelError(
            f"The shards of {index} hold {shorten(unlisted)}, which it does not list.", fix=fix
        )


def shorten(names: Sequence[str]) -> str:
    """Return the first of several names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: file by tensor name.

    Raises:
        ModelError: if it is no index.
    """
    document = read_json(index)
    placed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise ModelError(f"{index} cannot be read: it has no weight_map of file names.")
    return placed


def _beside(reader: Path, name: str) -> Path:
    """Resolve a file that an index names; it must not lead out of its folder.

    Raises:
        ModelError: if it is elsewhere, or no safetensors file or index.
    """
    path = reader.parent / name
    if path.name != name or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{reader} names the weights {name!r}.", allowed="a .safetensors file next to it"
        )
    return path


def _missing(folder: Path, names: Sequence[str]) -> ModelError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return ModelError(
            f"{folder} has its weights as pickles ({', '.join(pickles[:3])}), which run code when "
            "they are loaded; nmexport never reads them.",
            allowed="safetensors or .gguf",
            fix="convert them once with `save_pretrained(..., safe_serialization=True)`",
        )
    others = sorted(path.name for path in folder.glob("*.[sS]afetensors") if path.is_file())
    shards = [name for name in others if _SHARD.fullmatch(name)]
    lost_index = names == [WHOLE] and shards
    misnamed = names == [WHOLE] and len(others) == 1 and not shards
    held = (
        f"shards ({shards[0]}, ...) and no {INDEX}" if lost_index else others[0] if misnamed else ""
    )
    return ModelError(
        f"{folder} lacks the weights {', '.join(names[:3])}"
        + (f": it holds {held}." if held else "."),
        allowed=f"{WHOLE}, or {INDEX} with every file it lists",
        fix=f"call it {WHOLE} if it holds the whole model" if misnamed else "complete the download",
    )
