"""What export cannot take is refused before calibration, with no weight read.

So are sequences that are longer than the model's context.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torch import nn

from nmexport.errors import RecipeError
from nmexport.models.families import EXPORTED, context_of, refuse_kind, refused
from nmexport.models.skeleton import skeleton
from nmexport.models.streaming import fake_parameters
from nmexport.models.tracing import cache_shapes, trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe

_PARITY_PROMPT = 32  # tokens of the prompts that verification continues


def check_exportable(
    source: ModelSource, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> None:
    """Refuse a model that export cannot take.

    Args:
        source: Where its configuration lies.
        dtype: Element type to export in.
        trust_remote_code: Whether Python files of the model may run.

    Raises:
        ModelError: if its kind is not supported, it keeps another cache than one of keys and
            values, its attention takes unknown arguments, or its family cannot be traced.
    """
    model = skeleton(source, trust_remote_code=trust_remote_code, dtype=dtype)
    refuse_kind(model)
    fake_parameters(model)
    with _reached(model) as reached:
        cache_shapes(model)
    head = model.get_output_embeddings()
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    idle = [name for name in linears if name not in reached]
    if idle:
        raise refused(
            model.config,
            f"has {len(idle)} linears that text does not reach, such as {idle[0]}: they belong to "
            "another part, or are switched on by what a text model is not given",
        )
    if model.config.model_type not in EXPORTED:
        trace(model, linears)


def check_lengths(source: ModelSource, recipe: Recipe) -> None:
    """Refuse samples, windows and timings that are longer than the model's context.

    Raises:
        RecipeError: naming every option that asks for more, and what to type.
    """
    config = skeleton(source, trust_remote_code=recipe.model.trust_remote_code).config
    context = context_of(config)
    evaluation, latency = recipe.evaluation, recipe.latency
    # What an option asks for, and what beside it has to fit.
    asked = {
        "--calib-length": (recipe.calibration.length, 0),
        "--eval-length": (evaluation.length, 0),
        "evaluation.generate_tokens": (evaluation.generate_tokens, _PARITY_PROMPT),
        "latency.prefill_tokens": (latency.prefill_tokens, 0),
        "latency.decode_context": (latency.decode_context, 1),
    }
    long = {name: both for name, both in asked.items() if context and sum(both) > context}
    if not context or not long:
        return
    given = ", ".join(f"{name} {length}" for name, (length, _) in long.items())
    options = " ".join(
        f"{name} {context - more}" for name, (_, more) in long.items() if name.startswith("--")
    )
    keys = ", ".join(
        f"{name}: {context - more}" for name, (_, more) in long.items() if name[0] != "-"
    )
    raise RecipeError(
        f"{source.id} has a context of {context} tokens, and longer ones are asked for: {given}.",
        allowed=f"sequences of at most {context} tokens",
        fix="; ".join(part for part in (options, keys and f"in the recipe {keys}") if part),
    )


@contextlib.contextmanager
def _reached(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the linears that run while this lasts."""
    names: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: names.add(name)

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
