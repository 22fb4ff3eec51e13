"""Makes the windows that a model is evaluated on: of a text, or of one that it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.calibration.corpus import check_windows, evaluation_windows
from nmexport.calibration.self_text import self_text
from nmexport.models.loader import load_tokenizer
from nmexport.models.text_files import known_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.calibration.text_sources import TokenIds
    from nmexport.models.source import ModelSource
    from nmexport.progress import Progress
    from nmexport.recipe import EvaluationSection, Recipe


def windows_of(
    source: ModelSource,
    recipe: Recipe,
    load: Callable[[], Any],
    *,
    progress: Progress,
    label: str,
) -> TokenIds:
    """Make evaluation windows `[windows, length]` int64; see `corpus.evaluation_windows`.

    Args:
        source: The model.
        recipe: Names the text.
        load: Loads the dense model in float32, where it is to write the text.
        progress: Counts what it writes.
        label: What it counts that under.
    """
    tokenizer = load_tokenizer(source)

    def write(samples: int, length: int, seed: int) -> TokenIds:
        generate = self_text(load(), tokenizer, progress=progress, label=label)
        return generate(samples, length, seed)

    return evaluation_windows(
        recipe.evaluation, tokenizer, write, seed=recipe.seed, vocabulary=known_tokens(source)
    )


def check_text(source: ModelSource, section: EvaluationSection) -> None:
    """Refuse a text file that windows cannot be cut from; see `corpus.check_windows`."""
    check_windows(section, load_tokenizer(source), vocabulary=known_tokens(source))
