"""The files that make a GGUF model: one, or the parts of a split one, read as if they were one."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.models.integrity import check_gguf, damage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import ModuleType

UNPACKED = ".dequantised"
"""Folder of a work directory that holds such models as safetensors, by the digest of their files;
see `nmexport.models.unpacked`."""
UNPACKED_COMPLETE = "complete"
"""A file of each of them, written last."""
UNPACKED_BYTES = 5
"""What a weight takes there: float32, and its integer in a byte."""

_DIGITS = 12
_PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)", re.IGNORECASE)


def gguf_parts(path: Path) -> list[Path]:
    """Find the files of the model that a `.gguf` belongs to, and check that they are whole.

    Args:
        path: A GGUF in one file, or any part of a split one.

    Returns:
        The file, or all parts in their order; the first holds the metadata.

    Raises:
        ModelError: if a file is missing, damaged, or a part of another model.
    """
    header = check_gguf(path)
    count = int(header.metadata.get("split.count", 1))
    if count <= 1:
        return [path]
    number = int(header.metadata.get("split.no", 0)) + 1
    match = _PART.search(path.name)
    if match is None or (int(match[1]), int(match[2])) != (number, count):
        raise ModelError(
            f"{path} is part {number} of {count} of a split GGUF, and its name does not say so: "
            "the other parts are found by their names.",
            allowed=f"NAME-{number:05d}-of-{count:05d}.gguf, and so on",
            fix="give the parts the names that they were published under",
        )
    parts = [_part_path(path, index, count) for index in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(
            f"{path} is part {number} of {count} of a split GGUF, and {missing[0]} is not there.",
            allowed="all parts in one folder",
            fix="complete the download",
        )
    _check_parts(parts)
    return parts


def _part_path(path: Path, number: int, count: int) -> Path:
    return path.with_name(_PART.sub(f"-{number:05d}-of-{count:05d}", path.name))


def _check_parts(parts: Sequence[Path]) -> None:
    """Compare the headers of the parts.

    Raises:
        ModelError: if they are not the parts of one model.
    """
    headers = [check_gguf(part) for part in parts]
    for index, (part, header) in enumerate(zip(parts, headers, strict=True)):
        place = header.metadata.get("split.no"), header.metadata.get("split.count")
        if place != (index, len(parts)):
            raise damage_error(part, f"by its header it is no part {index + 1} of {len(parts)}")
    names = [name for header in headers for name in header.tensors]
    promised = headers[0].metadata.get("split.tensors.count", len(names))
    if len(set(names)) != len(names) or promised != len(names):
        raise damage_error(
            parts[0],
            f"its parts hold {len(names)} tensors, {len(set(names))} of different names, and its "
            f"header says {promised}: they are not of one model",
        )


def unpacked_folder(work: Path, digest: str) -> Path:
    """Return the folder of a work directory for a model as safetensors."""
    return work / UNPACKED / digest[:_DIGITS]


def is_unpacked(folder: Path) -> bool:
    """Tell whether that folder is complete."""
    return (folder / UNPACKED_COMPLETE).is_file()


def tensor_names(parts: Sequence[Path]) -> list[str]:
    """List the tensors in a model's files.

    Raises:
        ModelError: if a file is damaged.
    """
    return [name for part in parts for name in check_gguf(part).tensors]


def open_merged(parts: Sequence[Path]) -> Any:
    """Open a model's files as one `gguf.GGUFReader` with all tensors."""
    return _merge(tuple((part, part.stat().st_mtime_ns) for part in parts))


@functools.lru_cache(maxsize=1)  # every word of the vocabulary is a field: seconds of parsing
def _merge(parts: tuple[tuple[Path, int], ...]) -> Any:
    """Open files; each comes with the time of its last change, for the cache."""
    from gguf.gguf_reader import GGUFReader

    first, *others = [GGUFReader(part) for part, _ in parts]
    for other in others:
        first.tensors.extend(other.tensors)
    return first


@contextlib.contextmanager
def read_once(parts: Sequence[Path]) -> Iterator[None]:
    """Let transformers read all files of a `.gguf` model, and each of them once.

    It opens the first file, once for the config, the tokenizer and the weights each, and asks for
    the same table of tensor names once a module: the answers are remembered while this lasts.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loading

    def open_parts(_: str) -> Any:
        return open_merged(parts)

    with (
        replaced(gguf, "GGUFReader", open_parts),
        replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        replaced(loading, "tqdm", functools.partial(loading.tqdm, disable=True)),
    ):
        yield


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, replacement: object) -> Iterator[None]:
    """Replace an attribute of a module."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)
