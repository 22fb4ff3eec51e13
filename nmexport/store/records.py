"""Frozen dataclasses as JSON: the class is the schema, and reading checks every value against it.

A field has one of these types: `str`, `bool`, `int`, `float`, a `Literal` of such values, `Path`
(relative to the file's folder in JSON), `NMPattern` (text such as `8:16`), another such dataclass,
`tuple[T, ...]`, `tuple[T, U]`, `Mapping[str, T]`, `T | None`, or `object` for any value of JSON,
which is kept as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nmexport.errors import ArtifactError, PatternError
from nmexport.json_reader import parse_json
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Record = TypeVar("Record", bound=DataclassInstance)

_NAMES: Mapping[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
}


def read_record(record: type[Record], path: Path, *, schema: int, fix: str) -> Record:
    """Read a file that holds one record and the number of its schema.

    Args:
        record: The class to read.
        path: The file.
        schema: What its `schema` must be.
        fix: What the user can do where the file cannot be read.

    Raises:
        ArtifactError: if it is missing, no JSON, of another schema, or not such a record.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix=fix) from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        written = document.get("schema") if isinstance(document, dict) else document
        raise ArtifactError(
            f"{path} has schema {written!r}; another version of nmexport wrote it.",
            allowed=f"schema {schema}",
            fix=fix,
        )
    del document["schema"]
    try:
        return record_from(record, document, folder=path.parent)
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix=fix) from error


def write_record(record: DataclassInstance, path: Path, *, schema: int) -> None:
    """Write a file that `read_record` reads."""
    document = {"schema": schema, **json_from(record, folder=path.parent)}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How values are read."""

    folder: Path | None
    lenient: bool


def record_from(
    record: type[Record], document: object, *, folder: Path | None = None, lenient: bool = False
) -> Record:
    """Make a record from JSON values.

    Args:
        record: The class.
        document: What was parsed.
        folder: What its paths are relative to; None leaves them as they are.
        lenient: Ignore unknown keys, and take a field's default for a null that it does not allow.

    Raises:
        ValueError: naming the first field that is missing, unknown or of another type.
    """
    made: Record = _object(record, document, "", _Reading(folder=folder, lenient=lenient))
    return made


def json_from(record: DataclassInstance, *, folder: Path | None = None) -> dict[str, object]:
    """Return a record as JSON values, its paths relative to a folder."""
    return {
        field.name: _plain(getattr(record, field.name), folder)
        for field in dataclasses.fields(record)
    }


def _plain(value: object, folder: Path | None) -> Any:
    if isinstance(value, NMPattern):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_from(value, folder=folder)
    if isinstance(value, Path):
        target = value if folder is None else Path(os.path.relpath(value, folder.resolve()))
        return target.as_posix()
    if isinstance(value, Mapping):
        return {name: _plain(item, folder) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, folder) for item in value]
    return value


def _object(record: type[Any], value: object, place: str, reading: _Reading) -> Any:
    document = _expect(value, dict, place, "an object")
    hints = get_type_hints(record)
    unknown = sorted(document.keys() - hints.keys())
    if unknown and not reading.lenient:
        raise ValueError(f"{_join(place, unknown[0])} is no field of it")
    values = {}
    for field in dataclasses.fields(record):
        where = _join(place, field.name)
        default = (field.default, field.default_factory)
        has_default = default != (dataclasses.MISSING, dataclasses.MISSING)
        is_left_out = field.name not in document or (
            reading.lenient
            and has_default
            and document[field.name] is None
            and not _allows_null(hints[field.name])
        )
        if not is_left_out:
            values[field.name] = _value(hints[field.name], document[field.name], where, reading)
        elif not has_default:
            raise ValueError(f"{where} is missing")
    return record(**values)


def _value(hint: Any, value: object, place: str, reading: _Reading) -> Any:
    """Return a JSON value as its field's type."""
    kind = get_origin(hint) or hint
    if kind in _COMPOUND:
        return _COMPOUND[kind](hint, value, place, reading)
    if hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        return _object(hint, value, place, reading)  # type: ignore[arg-type]
    if hint is Path:
        path = Path(_expect(value, str, place, _NAMES[Path]))
        return path if reading.folder is None else (reading.folder / path).resolve()
    if hint is float:
        return float(_expect(value, int | float, place, _NAMES[float]))
    return _expect(value, hint, place, _NAMES[hint])


def _pattern(_hint: Any, value: object, place: str, _reading: _Reading) -> NMPattern:
    try:
        return NMPattern.parse(_expect(value, str, place, "a text"))
    except PatternError as error:
        raise ValueError(f"{place}: {error}") from error


def _optional(hint: Any, value: object, place: str, reading: _Reading) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    (other,) = (kind for kind in get_args(hint) if kind is not type(None))
    return _value(other, value, place, reading)


def _allows_null(hint: Any) -> bool:
    return hint is object or type(None) in get_args(hint)


def _choice(hint: Any, value: object, place: str, _: _Reading) -> Any:
    if value not in get_args(hint):
        allowed = ", ".join(map(str, get_args(hint)))
        raise ValueError(f"{place} is {value!r}, not one of {allowed}")
    return value


def _sequence(hint: Any, value: object, place: str, reading: _Reading) -> Any:
    items = _expect(value, list, place, "a list")
    kinds = get_args(hint)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    elif len(items) != len(kinds):
        raise ValueError(f"{place} is {value!r}, not a list of {len(kinds)}")
    return tuple(
        _value(kind, item, f"{place}[{index}]", reading)
        for index, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _mapping(hint: Any, value: object, place: str, reading: _Reading) -> Any:
    document = _expect(value, dict, place, "an object")
    kind = get_args(hint)[1]
    return {
        name: _value(kind, item, _join(place, name), reading) for name, item in document.items()
    }


_COMPOUND: Mapping[Any, Callable[[Any, object, str, _Reading], Any]] = {
    Literal: _choice,
    Mapping: _mapping,
    NMPattern: _pattern,
    Union: _optional,
    dict: _mapping,
    tuple: _sequence,
    types.UnionType: _optional,
}


def _expect(value: object, kind: Any, place: str, name: str) -> Any:
    # To Python, true is a whole number.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place or 'it'} is {value!r}, not {name}")
    return value


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
