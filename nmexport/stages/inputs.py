"""Inputs that every stage is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.environment import Environment
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """Everything a stage may read, and the one folder it may write."""

    recipe: Recipe
    source: ModelSource
    environment: Environment
    progress: Progress
    output: Path
    """The artifact folder to fill (a `.partial-<pid>` one: the pipeline renames it)."""
    resume: Path | None = None
    """A folder that outlives a killed run: what long work saves, to go on from. It may not exist
    yet, and is removed once the stage is complete."""
    upstream: Mapping[str, Path] = field(default_factory=dict)
    """Finished artifact folders of the stages named in `UPSTREAM`."""
