"""Reads a model's context length, and checks a recipe against it; no torch needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.errors import RecipeError
from nmexport.json_reader import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe

_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_PARITY_PROMPT = 32  # tokens of the prompts that verification continues


def context_of(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that a model was made for; None without an end (ALiBi)."""
    text = config.get_text_config()
    return _context({name: getattr(text, name, None) for name in _KEYS})


def check_lengths(source: ModelSource, recipe: Recipe, *, measured: bool) -> None:
    """Refuse samples, windows and timings that are longer than the model's context.

    Args:
        source: The model; where its files are no folder with a configuration, nothing is refused.
        recipe: Says how long each is.
        measured: Whether the built model will be measured too, and not only calibrated.

    Raises:
        RecipeError: naming every option that asks for more, and what to type.
    """
    context = _stored_context(source)
    evaluation, latency = recipe.evaluation, recipe.latency
    # What an option asks for, and what else has to fit.
    asked = {"--calib-length": (recipe.calibration.length, 0)}
    if measured:
        asked |= {
            "--eval-length": (evaluation.length, 0),
            "evaluation.generate_tokens": (evaluation.generate_tokens, _PARITY_PROMPT),
            "latency.prefill_tokens": (latency.prefill_tokens, 0),
            "latency.decode_context": (latency.decode_context, 1),
        }
    long = {name: both for name, both in asked.items() if context and sum(both) > context}
    if not context or not long:
        return
    given = ", ".join(f"{name} {length}" for name, (length, _) in long.items())
    fitting = {name: max(1, context - more) for name, (_, more) in long.items()}
    options = " ".join(f"{name} {size}" for name, size in fitting.items() if name[0] == "-")
    keys = ", ".join(f"{name}: {size}" for name, size in fitting.items() if name[0] != "-")
    raise RecipeError(
        f"{source.id} has a context of {context} tokens, and longer ones are asked for: {given}.",
        allowed=f"sequences of at most {context} tokens",
        fix="; ".join(part for part in (options, keys and f"in the recipe {keys}") if part),
    )


def _stored_context(source: ModelSource) -> int | None:
    try:
        document = parse_json((source.folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _context({**document, **(document.get("text_config") or {})})


def _context(values: Mapping[str, Any]) -> int | None:
    lengths = [values.get(name) for name in _KEYS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)
