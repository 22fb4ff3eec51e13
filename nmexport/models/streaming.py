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

from nmexport.errors import ArtifactError, ModelError
from nmexport.models.layerwise import skeleton, stored_names
from nmexport.models.loader import load_model
from nmexport.store.tensors import TensorReader

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
    """Whether weights are read from the files each time; else they are in memory."""


def open_for_export(
    source: ModelSource, *, dtype: torch.dtype, trust_remote_code: bool
) -> ExportModel:
    """Open a model without its weights where its files allow that, else load it.

    Files that only transformers' own loading understands (a `.gguf`, experts stored apart) are
    loaded.

    Raises:
        ModelError: if the model cannot be loaded.
    """
    streamed = _streamed(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if streamed is not None:
        return streamed
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    return ExportModel(model, lambda name: model.get_parameter(name).detach(), streamed=False)


def _streamed(
    source: ModelSource, *, dtype: torch.dtype, trust_remote_code: bool
) -> ExportModel | None:
    if source.gguf_file is not None:
        return None
    model = skeleton(source, trust_remote_code=trust_remote_code, dtype=dtype)
    try:
        reader = TensorReader(source.folder)
        stored = stored_names(model, set(reader.names))
    except (ArtifactError, ModelError):
        return None

    def parameter(name: str) -> torch.Tensor:
        return reader.read(stored[name]).to(dtype)

    _give_generation_config(model, source)
    model.tie_weights()  # what the skeleton has twice, transformers has once
    _fake_parameters(model)
    return ExportModel(model, parameter, streamed=True)


def _fake_parameters(model: nn.Module) -> None:
    """Exchange parameters on the meta device for fake ones on the CPU; shared ones stay shared."""
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


def _give_generation_config(model: Any, source: ModelSource) -> None:
    """What `from_pretrained` reads beside the weights."""
    from transformers import GenerationConfig

    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(
            source.folder, local_files_only=True
        )
