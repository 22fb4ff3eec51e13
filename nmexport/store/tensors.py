"""Named tensors on disk: one safetensors file, or shards with the index that Hugging Face reads.

The same tensors give the same bytes: names are sorted within a file, and nothing else is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from nmexport.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self

    import torch

SHARD_BYTES = 1 << 30
"""Most bytes that a writer holds in memory, except for a single larger group of tensors."""


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write one file, with the permissions of any other new file.

    safetensors moves a temporary file into place, which only its owner may read.
    """
    from safetensors.torch import save_file  # brings torch, which readers of names alone need not

    path.touch()
    mode = path.stat().st_mode
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=metadata)
    path.chmod(mode)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read one whole file.

    Raises:
        ArtifactError: if it is missing or not what it should be.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


class ShardedWriter:
    """Writes tensors as they come, holding at most one shard of them.

    Up to one shard the file is `STEM.safetensors`; beyond, `STEM-00001-of-0000N.safetensors` with
    `STEM.safetensors.index.json`. Files have their names only once the writer is closed.
    """

    def __init__(
        self, folder: Path, stem: str = "model", *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write under the folder, which exists."""
        self._folder, self._stem, self._shard_bytes = folder, stem, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error the folder is left without an index."""
        if kind is None:
            self.close()

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors that stay in one shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._shard_bytes:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left, name the files, write the index."""
        if self._pending or not self._shards:
            self._flush()
        names = self._final_names()
        for number, name in enumerate(names):
            self._draft(number).rename(self._folder / name)
        if len(names) > 1:
            self._write_index(names)

    def _flush(self) -> None:
        save_tensors(self._draft(len(self._shards)), self._pending)
        self._shards.append(sorted(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _draft(self, number: int) -> Path:
        return self._folder / f"{self._stem}.{number}.partial"

    def _final_names(self) -> list[str]:
        count = len(self._shards)
        if count == 1:
            return [f"{self._stem}.safetensors"]
        return [f"{self._stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def _write_index(self, names: list[str]) -> None:
        placed = {
            tensor: name
            for name, shard in zip(names, self._shards, strict=True)
            for tensor in shard
        }
        document = {"metadata": {"total_size": self._total_bytes}, "weight_map": placed}
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        (self._folder / _index_name(self._stem)).write_text(text, encoding="utf-8")


class TensorReader:
    """Reads single tensors of what a ShardedWriter wrote."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        """Look at the names only.

        Raises:
            ArtifactError: if the files or the index are missing or unreadable.
        """
        self._folder = folder
        self._places = _places(folder, stem)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._places)

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of that name."""
        return name in self._places

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ArtifactError: if there is none of that name, or its file is damaged.
        """
        if name not in self._places:
            raise ArtifactError(f"{self._folder} holds no tensor {name}.", fix="rebuild the stage")
        path = self._folder / self._places[name]
        try:
            with safe_open(path, framework="pt") as stream:
                tensor: torch.Tensor = stream.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error


class StoredGroup(Mapping[str, "torch.Tensor"]):
    """Tensors whose names begin alike, by the rest of their names; each read when asked for."""

    def __init__(
        self,
        reader: TensorReader,
        prefix: str,
        kinds: Iterable[str],
        *,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        """Name them; read none.

        Args:
            reader: Where they are.
            prefix: The beginning of their names, before a dot.
            kinds: The rests of their names.
            shared: Kinds that are stored under names of another group, and those names.
        """
        self._reader = reader
        self._names = {kind: f"{prefix}.{kind}" for kind in kinds} | dict(shared or {})

    def __getitem__(self, kind: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ArtifactError: if its file is damaged.
        """
        return self._reader.read(self._names[kind])

    def __iter__(self) -> Iterator[str]:
        """The rests of the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many tensors."""
        return len(self._names)


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def _places(folder: Path, stem: str) -> dict[str, str]:
    """File by tensor name."""
    index = folder / _index_name(stem)
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # Only names of files in this folder: an index is data, and must not lead elsewhere.
            return {str(name): Path(file).name for name, file in places.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise _unreadable(index, error) from error
    single = folder / f"{stem}.safetensors"
    try:
        with safe_open(single, framework="pt") as stream:
            return dict.fromkeys(stream.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise _unreadable(single, error) from error


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read: {error}", fix="rebuild the stage with --force")
