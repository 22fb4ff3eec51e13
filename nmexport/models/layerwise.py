"""A forward pass with one decoder layer in memory at a time, for models larger than the memory.

The weights stay in their safetensors files, which are mapped, not read.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from nmexport.environment import return_freed_memory
from nmexport.errors import ModelError
from nmexport.models.blocks import WHOLE, DecoderBlocks
from nmexport.models.skeleton import skeleton
from nmexport.models.weights import WeightTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nmexport.models.source import ModelSource


class LayerwiseModel(DecoderBlocks):
    """A causal LM in float32 that is run layer by layer."""

    def __init__(
        self,
        source: ModelSource,
        *,
        folder: Path | None = None,
        rounded: torch.dtype = torch.float32,
    ) -> None:
        """Build the skeleton and find every weight; read none.

        Args:
            source: A model in safetensors files.
            folder: On a disk with room for the hidden states of all samples; None is the system's.
            rounded: Type that weights are rounded to before they are computed with in float32.

        Raises:
            ModelError: if it is stored in another format, its files do not make the model, or it
                has no list of decoder layers.
        """
        if source.packed:
            raise ModelError(
                f"{source.id} is a .gguf, which cannot be read layer by layer.",
                allowed="a model in safetensors files",
                fix=WHOLE,
            )
        model = skeleton(source)
        table = WeightTable(model, source.weights_folder)
        super().__init__(model, weights=_Weights(table, rounded), folder=folder)
        table.fill_buffers(model)

    @contextlib.contextmanager
    def loaded(self, linear: nn.Linear) -> Iterator[nn.Linear]:
        """Hold the weight of one linear of the skeleton in memory.

        Raises:
            ModelError: if it cannot be read.
        """
        name = next(name for name, module in self.model.named_modules() if module is linear)
        with self._weights.loaded(name, linear):
            yield linear


class _Weights:
    """Puts weights into modules of a skeleton and takes them out again."""

    def __init__(self, table: WeightTable, rounded: torch.dtype) -> None:
        self._table = table
        self._rounded = rounded

    @contextlib.contextmanager
    def loaded(self, name: str, module: nn.Module) -> Iterator[None]:
        """Hold a module's weights in memory, in float32."""
        from accelerate.utils import set_module_tensor_to_device

        names = [own for own, _ in module.named_parameters()]
        try:
            for own in names:
                stored = self._table.read(f"{name}.{own}").to(self._rounded)
                # A copy, also of float32: a mapped file's alignment may change a product's bits.
                value = torch.empty(stored.shape, dtype=torch.float32).copy_(stored)
                set_module_tensor_to_device(module, own, "cpu", value=value)
                del stored, value
            yield
        finally:
            for own in names:
                set_module_tensor_to_device(module, own, "meta")
            return_freed_memory()
