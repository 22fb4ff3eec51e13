"""Frozen dataclasses as JSON: the class is the schema, and reading checks every value against it.

A field has one of these types: `str`, `bool`, `int`, `float`, a `Literal` of such values, `Path`
(relative to the file's folder in JSON), `NMPattern` (text such as `8:16`), another such dataclass,
`tuple[T, ...]`, `Mapping[str, T]`, `T | None`, or `Any` for what a foreign library wrote.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nmexport.errors import ArtifactError, PatternError
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
        document = json.loads(path.read_text(encoding="utf-8"))
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


def record_from(record: type[Record], document: object, *, folder: Path | None = None) -> Record:
    """Make a record from JSON values.

    Args:
        record: The class.
        document: What was parsed.
        folder: What its paths are relative to; None leaves them as they are.

    Raises:
        ValueError: naming the first field that is missing, unknown or of another type.
    """
    made: Record = _object(record, document, "", folder)
    return made


def json_from(record: DataclassInstance, *, folder: Path | None = None) -> dict[str, Any]:
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


def _object(record: type[Any], value: object, place: str, folder: Path | None) -> Any:
    document = _expect(value, dict, place, "an object")
    hints = get_type_hints(record)
    unknown = sorted(document.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{_join(place, unknown[0])} is no field of it")
    values = {}
    for field in dataclasses.fields(record):
        where = _join(place, field.name)
        if field.name in document:
            values[field.name] = _value(hints[field.name], document[field.name], where, folder)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} is missing")
    return record(**values)


def _value(hint: Any, value: object, place: str, folder: Path | None) -> Any:
    """Return a JSON value as its field's type."""
    kind = get_origin(hint) or hint
    if kind in _COMPOUND:
        return _COMPOUND[kind](hint, value, place, folder)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _object(hint, value, place, folder)  # type: ignore[arg-type]
    if hint is Path:
        path = Path(_expect(value, str, place, _NAMES[Path]))
        return path if folder is None else (folder / path).resolve()
    if hint is float:
        return float(_expect(value, int | float, place, _NAMES[float]))
    return _expect(value, hint, place, _NAMES[hint])


def _pattern(_hint: Any, value: object, place: str, _folder: Path | None) -> NMPattern:
    try:
        return NMPattern.parse(_expect(value, str, place, "a text"))
    except PatternError as error:
        raise ValueError(f"{place}: {error}") from error


def _optional(hint: Any, value: object, place: str, folder: Path | None) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    (other,) = (kind for kind in get_args(hint) if kind is not type(None))
    return _value(other, value, place, folder)


def _choice(hint: Any, value: object, place: str, _: Path | None) -> Any:
    if value not in get_args(hint):
        allowed = ", ".join(map(str, get_args(hint)))
        raise ValueError(f"{place} is {value!r}, not one of {allowed}")
    return value


def _sequence(hint: Any, value: object, place: str, folder: Path | None) -> Any:
    items = _expect(value, list, place, "a list")
    kind = get_args(hint)[0]
    return tuple(
        _value(kind, item, f"{place}[{index}]", folder) for index, item in enumerate(items)
    )


def _mapping(hint: Any, value: object, place: str, folder: Path | None) -> Any:
    document = _expect(value, dict, place, "an object")
    kind = get_args(hint)[1]
    return {name: _value(kind, item, _join(place, name), folder) for name, item in document.items()}


_COMPOUND: Mapping[Any, Callable[[Any, object, str, Path | None], Any]] = {
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
