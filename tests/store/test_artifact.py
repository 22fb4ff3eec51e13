"""What could hurt: two texts of one value, a manifest that reads back other, damage unseen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nmexport.errors import ArtifactError, InternalError, WorkDirectoryError
from nmexport.store.artifact import (
    MANIFEST,
    FileRecord,
    Manifest,
    UpstreamRecord,
    canonical_json,
    changes,
    damage,
    digest_of,
    plain,
    read_manifest,
    record_files,
)
from nmexport.store.work_directory import WorkDirectory

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def manifest(**changed: object) -> Manifest:
    given = {
        "stage": "fold",
        "key": "k" * 64,
        "inputs": {"a": 1},
        "upstream": {"calibrate": UpstreamRecord(key="u", digest="d")},
        "files": (FileRecord(path="x", bytes=1, sha256="s"),),
        "started": "2030-01-01T00:00:00+00:00",
        "seconds": 1.5,
        "command": "nmexport fold",
    }
    return Manifest(**{**given, **changed})


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_order_of_keys_does_not_change_a_digest(value: dict) -> None:
    assert digest_of(value) == digest_of(dict(reversed(value.items())))


def test_a_digest_tells_close_values_apart() -> None:
    values = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": [1]}, {"b": 1}, {"a": None}]
    assert len({digest_of(value) for value in values}) == len(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, Path("x"), b"x"])
def test_what_is_not_json_is_a_bug(value: object) -> None:
    with pytest.raises(InternalError, match="is not JSON"):
        canonical_json({"x": value})


def test_manifest_reads_back_equal() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()


def test_content_digest_is_about_files_alone() -> None:
    assert manifest(seconds=9.0, key="other").digest == manifest().digest
    other = (FileRecord(path="y", bytes=1, sha256="s"),)
    assert manifest(files=other).digest != manifest().digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', "\xff"])
def test_manifest_of_nonsense(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path)


def test_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished artifact"):
        read_manifest(tmp_path)


def test_records_leave_out_what_is_about_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("b/c/x", "a", MANIFEST, "recipe.yaml"):
        (tmp_path / name).write_text(name)
    assert [record.path for record in record_files(tmp_path)] == ["a", "b/c/x"]


def test_damage_in_words(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    finished = manifest(files=record_files(tmp_path))
    (tmp_path / MANIFEST).write_text(finished.to_json())
    assert damage(tmp_path, finished, full=True) is None
    path.write_bytes(b"12346")
    os.utime(path, (0, 0))
    assert damage(tmp_path, finished, full=False) is None
    assert damage(tmp_path, finished, full=True) == "x does not have the contents that were written"
    os.utime(path, (2**31, 2**31))  # younger than the manifest: looked into without being asked
    assert damage(tmp_path, finished, full=False) is not None
    path.write_bytes(b"1")
    assert damage(tmp_path, finished, full=False) == "x has 1 bytes, not 5"
    path.unlink()
    assert "cannot be read" in str(damage(tmp_path, finished, full=False))


def test_metrics_become_plain() -> None:
    measured = {
        "a": np.float32(0.5),
        "b": np.int64(3),
        "c": (1, Path("p"), None),
        "d": float("inf"),
        "e": np.float64("nan"),
        2: True,
    }
    assert plain(measured) == {
        "a": 0.5,
        "b": 3,
        "c": [1, "p", None],
        "d": None,
        "e": None,
        "2": True,
    }
    with pytest.raises(InternalError, match="not JSON"):
        plain({"x": object()})


def test_changes_name_what_differs() -> None:
    before = {"a": {"b": 1, "c": 2}, "gone": 1, "same": [1]}
    after = {"a": {"b": 1, "c": 3}, "new": "x" * 99, "same": [1]}
    assert changes(before, after) == [
        "a.c: 2 -> 3",
        "gone: 1 -> null",
        f"new: null -> {'x' * 39}…",
    ]


def test_artifact_that_was_never_built(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished export artifact") as caught:
        WorkDirectory(tmp_path).require("export")
    assert "--to export" in str(caught.value)


def test_folder_that_is_no_work_directory(tmp_path: Path) -> None:
    with pytest.raises(WorkDirectoryError, match="not a work directory"):
        WorkDirectory(tmp_path).recipe()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x"
    WorkDirectory.replace(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        WorkDirectory.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
