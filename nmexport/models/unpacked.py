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
from nmexport.models.gguf_files import (
    UNPACKED_BYTES,
    UNPACKED_COMPLETE,
    is_unpacked,
    unpacked_folder,
)
from nmexport.models.guard import quiet
from nmexport.models.loader import load_gguf
from nmexport.models.quantised.gguf_file import write_integers

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress


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
    if source.packed and not is_unpacked(unpacked_folder(work, source.digest)):
        _write(source, unpacked_folder(work, source.digest), progress)
    return reuse(source, work)


def reuse(source: ModelSource, work: Path) -> ModelSource:
    """Return the model that the work directory already holds unpacked, or the given one."""
    folder = unpacked_folder(work, source.digest)
    if not source.packed or not is_unpacked(folder):
        return source
    return dataclasses.replace(source, unpacked=folder)


def _write(source: ModelSource, folder: Path, progress: Progress) -> None:
    """Write the model, if the disk has room for it."""
    progress.note(f"dequantising {source.gguf_file}, once for all stages")
    model, names = load_gguf(source, dtype=torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = UNPACKED_BYTES * sum(parameter.numel() for parameter in model.parameters())
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        progress.note(
            f"{needed / 1e9:.1f} GB for it are not free on this disk: each stage dequantises it"
        )
        return
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet():
            model.save_pretrained(partial)
            write_integers(source.gguf_files, model, names, partial)
        (partial / UNPACKED_COMPLETE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise ModelError(
            f"{folder} cannot be written: {error}", fix="choose another --work"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
