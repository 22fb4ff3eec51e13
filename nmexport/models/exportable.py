"""Refuses what export cannot take before calibration, reading no weight."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from torch import nn

from nmexport.models.families import EXPORTED, family_error, refuse_kind
from nmexport.models.skeleton import skeleton
from nmexport.models.streaming import fake_parameters
from nmexport.models.tracing import cache_shapes, trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from transformers import PreTrainedModel

    from nmexport.models.source import ModelSource


def check_exportable(source: ModelSource, *, dtype: torch.dtype) -> None:
    """Refuse a model that export cannot take.

    Args:
        source: Where its configuration lies.
        dtype: Element type to export in.

    Raises:
        ModelError: if its kind is not supported, it keeps another cache than one of keys and
            values, its attention takes unknown arguments, its linears run not once a token, or its
            family cannot be traced.
    """
    model, linears = check_kind(source, dtype=dtype)
    if model.config.model_type not in EXPORTED:
        trace(model, linears)


def check_kind(source: ModelSource, *, dtype: torch.dtype) -> tuple[PreTrainedModel, list[str]]:
    """Refuse a model that export cannot take, by what shows without a trace.

    Returns:
        The model, with fake parameters, and the names of its linears but the head.

    Raises:
        ModelError: as `check_exportable`, except for a family that cannot be traced.
    """
    model = skeleton(source, dtype=dtype)
    refuse_kind(model)
    fake_parameters(model)
    with _count_runs(model) as runs:
        cache_shapes(model)
    head = model.get_output_embeddings()
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    idle = [name for name in linears if not runs[name]]
    if idle:
        raise family_error(
            model.config,
            f"has {len(idle)} linears that text does not reach, such as {idle[0]}: they belong to "
            "another part, or are switched on by what a text model is not given",
        )
    repeated = [name for name in linears if runs[name] > 1]
    if repeated:
        raise family_error(
            model.config,
            f"runs {len(repeated)} of its linears several times a token, such as {repeated[0]}: "
            "each time they meet other activations, and one calibration does not fit them all",
        )
    return model, linears


@contextlib.contextmanager
def _count_runs(model: nn.Module) -> Iterator[Counter[str]]:
    """Count how often each linear runs, by name."""
    runs: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: runs.update((name,))

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()
