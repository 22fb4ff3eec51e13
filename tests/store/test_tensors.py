"""Named tensors on disk: who may read the files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.calibration.checkpoint import Checkpoint
from nmexport.store.tensors import ShardedWriter, save_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TENSORS = {"a": torch.arange(4.0)}


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """What a new file's permissions are under a umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path, mode: int) -> None:
    """safetensors' own are for the owner alone."""
    save_tensors(tmp_path / "one.safetensors", TENSORS)
    with ShardedWriter(tmp_path, "many", shard_bytes=1) as writer:
        writer.add(TENSORS)
        writer.add({"b": torch.ones(3)})
    Checkpoint(tmp_path / "checkpoint", identity="x").save(TENSORS, {})
    files = sorted(path for path in tmp_path.iterdir())
    assert len(files) == 5
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {
        path.name: mode for path in files
    }
