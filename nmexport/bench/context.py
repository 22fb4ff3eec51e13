"""Refuses requests longer than a model's context before anything is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.errors import RecipeError
from nmexport.generation.context import context_length

if TYPE_CHECKING:
    from pathlib import Path


def check_context(export: Path, tokens: int, *, options: str) -> None:
    """Refuse sequences longer than the model's context.

    Args:
        export: The exported model's folder.
        tokens: Length of the longest sequence.
        options: Options that ask for it, as the user knows them.

    Raises:
        RecipeError: naming both lengths.
        ArtifactError: if the export does not say.
    """
    limit = context_length(export)
    if tokens > limit:
        raise RecipeError(
            f"{options} ask for {tokens} tokens, and the model's context is {limit}.",
            allowed=f"at most {limit} tokens",
        )
