"""Where a model's files lie and what identifies them; no torch needed to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found."""

    id: str
    """As the recipe names it: a Hub id, or a path."""
    revision: str | None
    """Hub commit, where it came from a hub."""
    folder: Path
    """Local folder with config, weights and tokenizer files, or with the `.gguf` file."""
    gguf_file: str | None
    """Name of the `.gguf` file in the folder, where that is the format."""
    digest: str
    """sha256 over the names and contents of the files that the model is loaded from."""
