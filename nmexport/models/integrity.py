"""Checks that weight files are complete by their headers: reads no tensor, needs no torch."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.json_reader import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LENGTH = struct.Struct("<Q")  # a safetensors file begins with the size of its JSON header
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Bits of an element, by the format's names.
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"
_GGUF_MAGIC = b"GGUF"
# Fixed-size metadata values of a GGUF, by type number; 8 is a string, 9 an array.
_GGUF_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_VERSIONS = (2, 3)
_GGUF_ALIGNMENT = 32  # unless its metadata names another


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header describes it."""

    file: Path
    dtype: str
    """As the format spells it: F32, BF16, I8, F8_E4M3, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GgufHeader:
    """Header of a GGUF file."""

    metadata: Mapping[str, Any]
    """Numbers and strings; arrays are left out."""
    tensors: tuple[str, ...]
    bytes_needed: int
    """Size up to the end of the last tensor of a known type."""


def check_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Compare what the header promises with the size of the file, and return the tensors.

    Raises:
        ModelError: if the header is malformed or the file shorter or longer than it says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = _LENGTH.unpack(file.read(_LENGTH.size))
            text = file.read(min(header_bytes, _MAX_HEADER_BYTES))
        header = parse_json(text, make_object=_refuse_repeats)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        tensors = {
            name: StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        }
        end = max((end for _, end in spans.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise not_readable(path, error) from error
    expected = _LENGTH.size + header_bytes + end
    if size != expected:
        raise damage_error(path, f"it has {size} bytes, its header says {expected}")
    for name, (begin, end) in spans.items():
        _check_span(tensors[name], name, end - begin)
    return tensors


def _check_span(tensor: StoredTensor, name: str, stored: int) -> None:
    """Compare a tensor's shape with the bytes that the header gives it.

    Raises:
        ModelError: if they differ; an unknown element type is for the loader to refuse.
    """
    bits = _BITS.get(tensor.dtype)
    needed = None if bits is None else prod(tensor.shape) * bits // 8
    if min(tensor.shape, default=0) < 0 or needed not in {None, stored}:
        raise damage_error(
            tensor.file,
            f"{name} of shape {list(tensor.shape)} in {tensor.dtype} cannot fill {stored} bytes",
        )


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, object]:
    """Build a JSON object; refuse repeated keys.

    Raises:
        ValueError: if a key comes twice.
    """
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in it twice")
    return document


def read_json(path: Path) -> Any:
    """Read a JSON file of a model; keys that come twice are an error.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), make_object=_refuse_repeats)
    except (OSError, ValueError) as error:
        raise not_readable(path, error) from error


def check_gguf(path: Path) -> GgufHeader:
    """Read the header of a GGUF file and compare the size of the file with it.

    Raises:
        ModelError: if the file is no GGUF, is damaged, or is shorter than its header says.
    """
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
        if magic != _GGUF_MAGIC:
            begin = ValueError(f"it begins with {magic!r}, not with {_GGUF_MAGIC!r}")
            raise not_readable(path, begin)
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _GgufCursor(data).header()
        except _UnknownVersionError as error:
            raise ModelError(
                f"{path} is a GGUF of version {error}, by its first bytes.",
                allowed="versions 2 and 3, with the lowest byte first",
                fix="convert the model again with a llama.cpp of today",
            ) from error
        except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
            raise damage_error(path, f"its header cannot be read ({error})") from error
    size = path.stat().st_size
    if size < header.bytes_needed:
        raise damage_error(path, f"it has {size} bytes, its header says {header.bytes_needed}")
    return header


class _UnknownVersionError(Exception):
    """A GGUF of a version that is not supported; holds its number."""


class _GgufCursor:
    """Walks through a GGUF header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(_GGUF_MAGIC)

    def header(self) -> GgufHeader:
        from gguf.constants import GGML_QUANT_SIZES

        version, count, entries = self._take("<IQQ")
        if version not in _GGUF_VERSIONS:
            raise _UnknownVersionError(version)
        metadata = {}
        for _ in range(entries):
            name = self._string()
            value = self._value(self._take("<I")[0])
            if value is not None:
                metadata[name] = value
        names, end = [], 0
        for _ in range(count):
            names.append(self._string())
            (rank,) = self._take("<I")
            elements = prod(self._take(f"<{rank}Q"))
            kind, offset = self._take("<IQ")
            if kind in GGML_QUANT_SIZES:  # another is for the loader to refuse, by its name
                block, size = GGML_QUANT_SIZES[kind]
                end = max(end, offset + elements // block * size)
        alignment = int(metadata.get("general.alignment", _GGUF_ALIGNMENT))
        start = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, tuple(names), start + end if end else self._at)

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        if self._at + length > len(self._data):
            raise ValueError("a string goes beyond the end of the file")
        text = self._data[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        """Read a number or a string; skip an array and return None."""
        if kind == _GGUF_STRING:
            return self._string()
        if kind != _GGUF_ARRAY:
            return self._take(_GGUF_SCALARS[kind])[0]
        element, count = self._take("<IQ")
        if element in _GGUF_SCALARS:
            self._at += count * struct.calcsize(_GGUF_SCALARS[element])
            return None
        for _ in range(count):
            self._value(element)
        return None


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether a file is what git leaves in place of one that Git LFS has not fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def not_readable(path: Path, error: Exception | None = None) -> ModelError:
    """Build the error that says a model's file is not what its name says."""
    if is_lfs_pointer(path):
        return ModelError(
            f"{path} is a pointer of Git LFS, {path.stat().st_size} bytes that say where the file "
            "is to be had.",
            fix="run `git lfs pull` in that folder, or download the model with `hf download`",
        )
    if path.suffix == ".json":
        return ModelError(f"{path} cannot be read: {error}")
    return damage_error(path, f"its header cannot be read ({error})")


def damage_error(path: Path, what: str) -> ModelError:
    """Build the error that says a weight file is broken."""
    return ModelError(
        f"The weights {path} are damaged or incomplete: {what}.",
        fix="download or copy the file again, and compare its size or checksum with the original",
    )
