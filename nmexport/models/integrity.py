"""Whether weight files are whole, by their headers alone: no tensor is read, no torch needed."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

from nmexport.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

_LENGTH = struct.Struct("<Q")  # a safetensors file begins with the size of its JSON header
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_GGUF_MAGIC = b"GGUF"


def check_safetensors(path: Path) -> None:
    """Compare what the header promises with the size of the file.

    Raises:
        ModelError: if the header is malformed or the file shorter or longer than it says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(min(header_bytes, _MAX_HEADER_BYTES)))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(path, f"its header cannot be read ({error})") from error
    expected = _LENGTH.size + header_bytes + max(ends, default=0)
    if size != expected:
        raise damaged(path, f"it has {size} bytes, its header says {expected}")


def check_gguf(path: Path) -> None:
    """Look at the magic number; the rest shows when the file is read.

    Raises:
        ModelError: if the file is no GGUF.
    """
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise damaged(path, f"it begins with {magic!r}, not with {_GGUF_MAGIC!r}")


def damaged(path: Path, what: str) -> ModelError:
    """The error that says a weight file is broken."""
    return ModelError(
        f"The weights {path} are damaged or incomplete: {what}.",
        fix="download or copy the file again, and compare its size or checksum with the original",
    )
