"""A `.gguf` dequantised once and kept as safetensors, so that no stage has to do it again.

The integers that its weights were dequantised from lie next to them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

import torch

from nmexport.errors import ModelError
from nmexport.models.guard import quiet
from nmexport.models.loader import load_gguf
from nmexport.models.quantised.gguf_file import write_integers

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress

FOLDER = ".dequantised"
"""Folder of a work directory that holds such models, by the digest of their files."""

_DIGITS = 12
_COMPLETE = "complete"  # written last
_BYTES = 5  # of a weight: float32, and its integer in a byte


def unpack(source: ModelSource, work: Path, progress: Progress) -> ModelSource:
    """Dequantise a `.gguf` into a work directory, unless it is there; other models are as they are.

    Values are kept in float32, as they come out of the file, so every type reads the same from
    here as from the `.gguf`. Where the disk has no room, each stage reads the file itself.

    Args:
        source: The model.
        work: The work directory, held by this process.
        progress: Told what is done.

    Raises:
        ModelError: if the model cannot be loaded.
    """
    if not source.packed:
        return source
    folder = work / FOLDER / source.digest[:_DIGITS]
    if not (folder / _COMPLETE).is_file() and not _write(source, folder, progress):
        return source
    return dataclasses.replace(source, unpacked=folder)


def _write(source: ModelSource, folder: Path, progress: Progress) -> bool:
    """Write the model; False where the disk has no room for it."""
    progress.note(f"dequantising {source.gguf_file}, once for all stages")
    model, names = load_gguf(source, dtype=torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = _BYTES * sum(parameter.numel() for parameter in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        progress.note(
            f"{needed / 1e9:.1f} GB for it are not free on this disk: each stage dequantises it"
        )
        return False
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(partial)
            path = source.folder / str(source.gguf_file)
            write_integers(path, model, names, partial)
        (partial / _COMPLETE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {error}", fix="choose another --work"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True
