"""Reads how long a sequence an exported model takes, and where length changes its results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError
from nmexport.json_reader import parse_json

if TYPE_CHECKING:
    from pathlib import Path


def context_length(folder: Path) -> int:
    """Return the number of tokens that the model was made for.

    Raises:
        ArtifactError: if the export does not say.
    """
    path = folder / "genai_config.json"
    try:
        length: int = parse_json(path.read_text(encoding="utf-8"))["model"]["context_length"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} does not say the model's context length: {error!r}",
            fix="run `nmexport export --force`",
        ) from error
    return length


def length_switch(folder: Path) -> int | None:
    """Return the tokens up to which a model uses short rotary frequencies; None with one set.

    Keys in a cache keep the frequencies that they were made with: a sequence that grows beyond
    this has to be computed anew, as transformers does, and a longer prompt must not come in pieces.
    """
    try:
        document = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    rotary: Any = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if "longrope" not in (rotary.get("rope_type"), rotary.get("type")):
        return None
    short = rotary.get("original_max_position_embeddings") or document.get(
        "original_max_position_embeddings"
    )
    return None if short is None else int(short)
