"""Pipelines of real stages, silent, on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.environment import probe
from nmexport.models.source import resolve
from nmexport.pipeline import Pipeline
from nmexport.progress import Silent
from nmexport.store.work_directory import WorkDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe


def pipeline_in(work: Path, recipe: Recipe, source: ModelSource | None = None) -> Pipeline:
    """A pipeline in a work directory; the model is the recipe's, or another."""
    return Pipeline(
        recipe=recipe,
        source=source or resolve(recipe.model),
        environment=probe(),
        work=WorkDirectory(work),
        progress=Silent(),
    )
