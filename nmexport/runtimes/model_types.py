"""Whether a model computes in bfloat16, read off its serialised form without the package `onnx`.

A server opens models in an environment that has ONNX Runtime and not `onnx`, and a float32 model
should not wait for a whole graph to be parsed. So the few fields that say it are found by walking
protobuf's wire format, over everything between.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WIDENED = "nmexport.widened"
"""Metadata key of a model that takes and gives bfloat16 and computes in float32 between."""

_BFLOAT16 = 16  # as ONNX numbers element types
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
# Field numbers of onnx.proto.
_GRAPH, _METADATA, _METADATA_KEY = 7, 14, 1
_INPUT, _OUTPUT = 11, 12
_TYPE, _TENSOR, _ELEMENT = 2, 1, 1


def needs_widening(model: Path | bytes) -> bool:
    """Whether a model takes or gives bfloat16 and is not yet made for a processor.

    False of what is no model: the runtime says what is wrong with it.
    """
    try:
        if isinstance(model, bytes):
            return _needs_widening(memoryview(model))
        with (
            model.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            return _needs_widening(view)
    except (IndexError, ValueError):  # cut off, or empty
        return False


def _needs_widening(model: memoryview) -> bool:
    for entry in _messages(model, (0, len(model)), _METADATA):
        for start, end in _messages(model, entry, _METADATA_KEY):
            if bytes(model[start:end]) == WIDENED.encode():
                return False
    return any(
        _element_type(model, value) == _BFLOAT16
        for graph in _messages(model, (0, len(model)), _GRAPH)
        for number in (_INPUT, _OUTPUT)
        for value in _messages(model, graph, number)
    )


def _element_type(model: memoryview, value: tuple[int, int]) -> int | None:
    """Of a ValueInfoProto's tensor."""
    for kind in _messages(model, value, _TYPE):
        for tensor in _messages(model, kind, _TENSOR):
            for number, wire, start, _ in _fields(model, tensor):
                if (number, wire) == (_ELEMENT, _VARINT):
                    return _varint(model, start)[0]
    return None


def _messages(model: memoryview, within: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Where each field of that number begins and ends."""
    for number, wire, start, end in _fields(model, within):
        if (number, wire) == (wanted, _BYTES):
            yield start, end


def _fields(model: memoryview, within: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, end) of each field of a message, its contents unread.

    Raises:
        ValueError: if this is no message.
        IndexError: if it is cut off.
    """
    at, last = within
    while at < last:
        tag, at = _varint(model, at)
        number, wire = tag >> 3, tag & 7
        start = at
        if wire == _VARINT:
            _, at = _varint(model, at)
        elif wire == _BYTES:
            size, start = _varint(model, at)
            at = start + size
        elif wire in _FIXED_SIZES:
            at += _FIXED_SIZES[wire]
        else:
            raise ValueError(f"wire type {wire}")
        yield number, wire, start, at


def _varint(model: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where the next field begins."""
    value = shift = 0
    while True:
        byte = model[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:  # noqa: PLR2004  the last byte of it
            return value, at
