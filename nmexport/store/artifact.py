"""A stage's finished folder: what it was made from, what it holds, and if it is intact.

Pure functions over folders; where folders lie and how they come to be is `work_directory`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError, InternalError
from nmexport.json_reader import parse_json
from nmexport.store.records import json_from, record_from

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SCHEMA = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
"""The resolved recipe that the manifest's command names, kept next to it."""
KEY_CHARS = 12
# Not contents of an artifact: they are about it, and may differ between equal artifacts.
_ABOUT = frozenset({MANIFEST, RECIPE})
_HASHED_AT_A_TIME = 8


def canonical_json(value: object) -> str:
    """Serialise a value to its one JSON text: sorted keys, no spaces, no NaN.

    Raises:
        InternalError: if the value holds anything that is not JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InternalError(f"{value!r} is not JSON: {error}") from error


def digest_of(value: object) -> str:
    """Hash a value's canonical JSON (sha256, hex)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hash a file's contents (sha256, hex)."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_digests(paths: Sequence[Path], digest: Callable[[Path], str] = file_digest) -> list[str]:
    """Hash several files in parallel (sha256): a core hashes 0.5 to 1.5 GB/s."""
    with ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
        return list(pool.map(digest, paths))


def _written_digest(path: Path) -> str:
    """Return the digest of a file, from memory if this process hashed it after writing."""
    status = path.stat()
    return _digest_of_state(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest_of_state(path: Path, *state: int) -> str:
    del state
    return file_digest(path)


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of an artifact."""

    path: str
    """Relative to the artifact's folder, with forward slashes."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class UpstreamRecord:
    """An artifact that was read to make this one."""

    key: str
    digest: str
    """`Manifest.digest` of what was read."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of a finished stage, written last: its presence means the stage is complete."""

    schema: int = SCHEMA
    stage: str
    key: str
    """sha256 over everything that can change the result."""
    inputs: dict[str, object]
    upstream: dict[str, UpstreamRecord]
    files: tuple[FileRecord, ...]
    environment: dict[str, object] = field(default_factory=dict)
    metrics: dict[str, object] = field(default_factory=dict)
    started: str
    """UTC, ISO 8601."""
    seconds: float
    command: str
    """The line that rebuilds just this stage."""
    peak_memory_bytes: int | None = None
    """Most that the process held while the stage ran, mapped files included."""
    share: float | None = None
    """Share of the build's total time; None until the build is done."""

    @property
    def digest(self) -> str:
        """sha256 over the names and contents of the files: equal for equal artifacts."""
        return digest_of([[record.path, record.sha256] for record in self.files])

    @property
    def bytes(self) -> int:
        """Size of the files together."""
        return sum(record.bytes for record in self.files)

    def to_json(self) -> str:
        """Text of `manifest.json`."""
        return json.dumps(json_from(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read `manifest.json`.

        Raises:
            ValueError: if it is not one.
        """
        document = parse_json(text)
        if isinstance(document, dict) and document.get("schema") != SCHEMA:
            raise ValueError(f"schema {document.get('schema')}, not {SCHEMA}")
        return record_from(cls, document)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact folder.

    Raises:
        ArtifactError: if there is none, or it is not a manifest of this schema.
    """
    path = folder / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} holds no finished artifact: there is no {MANIFEST} in it.",
            fix="build it with `nmexport build`",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}", fix="rebuild the stage with --force STAGE"
        ) from error


def record_files(folder: Path) -> tuple[FileRecord, ...]:
    """Record size and digest of every file under a folder, in order of name.

    Raises:
        InternalError: if there is a link: an artifact holds its own bytes.
    """
    names: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise InternalError(f"a stage left a link in its artifact: {name}")
        if path.is_file() and name not in _ABOUT:
            names[name] = path
    digests = file_digests(list(names.values()), _written_digest)
    return tuple(
        FileRecord(path=name, bytes=path.stat().st_size, sha256=digest)
        for (name, path), digest in zip(names.items(), digests, strict=True)
    )


def damage(folder: Path, manifest: Manifest, *, full: bool) -> str | None:
    """Describe the damage to an artifact's files; None where there is none.

    Sizes are always compared. Contents are where `full` is asked for (before a stage reads
    them), and where a file was written after its manifest, which no stage does.
    """
    finished = (folder / MANIFEST).stat().st_mtime_ns
    suspects: list[FileRecord] = []
    try:
        for record in manifest.files:
            status = (folder / record.path).stat()
            if status.st_size != record.bytes:
                return f"{record.path} has {status.st_size} bytes, not {record.bytes}"
            if full or status.st_mtime_ns > finished:
                suspects.append(record)
        digests = file_digests([folder / record.path for record in suspects])
    except OSError as error:
        name = Path(str(error.filename)).relative_to(folder).as_posix()
        return f"{name} cannot be read ({error.strerror})"
    for record, digest in zip(suspects, digests, strict=True):
        if digest != record.sha256:
            return f"{record.path} does not have the contents that were written"
    return None


def flush_to_disk(folder: Path) -> None:
    """Make everything under a folder survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def plain(value: object) -> Any:
    """Convert measurements to JSON values: array scalars become numbers, NaN becomes None.

    Raises:
        InternalError: if something in it has no JSON form.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    item = getattr(value, "item", None)
    if callable(item):  # a NumPy or torch scalar
        return plain(item())
    raise InternalError(f"a metric is not JSON: {value!r}")


def changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the differences between two manifests' inputs, as `dotted.name: old -> new`."""
    lines = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {_short(old)} -> {_short(new)}")
    return lines


def _short(value: object) -> str:
    """Write a value on one line; cut digests and long lists."""
    limit = 40
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
