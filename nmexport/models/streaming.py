"""A model for export whose weights stay on disk: traced without them, read one by one when written.

Parameters are fake tensors, which have a shape, a type and a device and no memory; the tracer
needs no more. What the graph then holds in their place is read from the safetensors files at the
moment it is copied into the exported file. So the memory that export takes does not grow with the
model, but with its largest matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nmexport.models.loader import load_model
from nmexport.models.skeleton import give_generation_config, skeleton
from nmexport.models.weights import WeightTable, is_finite, not_finite

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.models.source import ModelSource


@dataclass(frozen=True)
class ExportModel:
    """A model to trace, and its parameters by name."""

    model: Any
    """A causal LM in the export type; its parameters may be fake."""
    parameter: Callable[[str], torch.Tensor]
    """Reads a parameter in the export type."""
    streamed: bool
    """True where weights are read from the files each time; else they are in memory."""


def open_for_export(source: ModelSource, *, dtype: torch.dtype) -> ExportModel:
    """Open a model without its weights; a `.gguf` that is not unpacked is loaded.

    Raises:
        ModelError: if the model cannot be loaded, or its files do not make it.
    """
    if source.packed:
        model = load_model(source, dtype=dtype)
        return ExportModel(model, lambda name: model.get_parameter(name).detach(), streamed=False)
    empty = skeleton(source, dtype=dtype)
    table = WeightTable(empty, source.weights_folder)
    table.fill_buffers(empty)

    def parameter(name: str) -> torch.Tensor:
        value = table.read(name).to(dtype)
        if not is_finite(value):
            raise not_finite(name, source.weights_folder, dtype)
        return value

    give_generation_config(empty, source)
    empty.tie_weights()  # what the skeleton has twice, transformers has once
    fake_parameters(empty)
    return ExportModel(empty, parameter, streamed=True)


def fake_parameters(model: nn.Module) -> None:
    """Replace parameters on the meta device by fake ones on the CPU; shared ones stay shared."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fakes: dict[int, nn.Parameter] = {}
    # Buffers, as rotary frequencies, are real: they are small, and are computed, not stored.
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                if id(value) not in fakes:
                    empty = torch.empty(value.shape, dtype=value.dtype)
                    fakes[id(value)] = nn.Parameter(empty, requires_grad=False)
                setattr(module, name, fakes[id(value)])
