"""Records as JSON: what is written is read, and every wrong value is named with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping  # noqa: TC003  records are read by their annotations
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003
from typing import Any, Literal

import pytest
from nmexport.errors import ArtifactError
from nmexport.store.records import json_from, read_record, record_from, write_record


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Whole:
    count: int
    kind: Literal["a", "b"]
    is_ready: bool
    file: Path
    parts: tuple[Part, ...]
    named: Mapping[str, Part]
    free: object
    limit: int | None
    other: Part | None = None


def whole(folder: Path) -> Whole:
    part = Part(name="one", share=1.0)
    return Whole(
        count=3,
        kind="b",
        is_ready=True,
        file=folder.resolve().parent / "file.bin",
        parts=(part, Part(name="two")),
        named={"x": part},
        free={"any": [1, None]},
        limit=None,
        other=part,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    write_record(whole(tmp_path), path, schema=3)
    assert read_record(Whole, path, schema=3, fix="again") == whole(tmp_path)
    document = json.loads(path.read_text())
    assert (document["schema"], document["file"]) == (3, "../file.bin")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": "3"}, r"^count is '3', not a whole number"),
        ({"count": True}, r"^count is True, not a whole number"),
        ({"count": 3.5}, r"^count is 3\.5, not a whole number"),
        ({"is_ready": 1}, r"^is_ready is 1, not true or false"),
        ({"kind": "c"}, r"^kind is 'c', not one of a, b"),
        ({"file": 5}, r"^file is 5, not a path"),
        ({"parts": {}}, r"^parts is \{\}, not a list"),
        ({"parts": [{"name": "x"}, {"name": 2}]}, r"^parts\[1\]\.name is 2, not a text"),
        ({"parts": [{}]}, r"^parts\[0\]\.name is missing"),
        ({"named": []}, r"^named is \[\], not an object"),
        ({"named": {"x": {"name": "x", "share": "1"}}}, r"^named\.x\.share is '1', not a number"),
        ({"other": 3}, r"^other is 3, not an object"),
        ({"limit": "no"}, r"^limit is 'no', not a whole number"),
        ({"odd": 1}, r"^odd is no field of it"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        record_from(Whole, {**json_from(whole(tmp_path)), **changes})


def test_a_number_may_be_whole(tmp_path: Path) -> None:
    share = record_from(Part, {"name": "x", "share": 1}).share
    assert isinstance(share, float)
    with pytest.raises(ValueError, match="not a number"):
        record_from(Part, {"name": "x", "share": True})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"schema": 2}', '{"schema": 3}'])
def test_a_file_that_is_none_is_the_artifacts_fault(tmp_path: Path, text: str) -> None:
    path = tmp_path / "whole.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"whole\.json") as caught:
        read_record(Whole, path, schema=3, fix="build it again")
    assert caught.value.fix == "build it again"
    with pytest.raises(ArtifactError, match=r"gone\.json"):
        read_record(Whole, tmp_path / "gone.json", schema=3, fix="build it again")
