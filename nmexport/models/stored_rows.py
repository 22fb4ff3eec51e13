"""The input embedding in integers, for export: rounded, or as a checkpoint stores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from onnx_ir import tensor_adapters

from nmexport.graph.embedding import StoredRows
from nmexport.models.embedding import embedding_names
from nmexport.models.imported import imported_weights
from nmexport.models.lazy_tensors import defer
from nmexport.sparsity import quantisation

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from nmexport.models.source import ModelSource


def rounded_rows(model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> StoredRows:
    """Round the rows to 8 bits, a scale for each group of columns.

    Args:
        model: The model, its parameters perhaps fake.
        read: Reads a parameter.
    """
    name = embedding_names(model)[0]
    table = model.get_parameter(name)
    values = torch.empty(table.shape, dtype=torch.int8, device="meta")
    groups = quantisation.row_groups(table.shape[1])
    scale = torch.empty(len(table), groups, dtype=table.dtype, device="meta")

    def part(index: int) -> torch.Tensor:
        return quantisation.rounded_rows(read(name))[index]

    return StoredRows(
        defer(lambda: part(0), like=values, name=f"{name}.values"),
        defer(lambda: part(1), like=scale, name=f"{name}.scale"),
    )


def imported_rows(model: PreTrainedModel, source: ModelSource) -> StoredRows | None:
    """Read rows as the checkpoint stores them; None for floats, or with zero points."""
    imported = imported_weights(source)
    name = embedding_names(model)[0]
    weight = None if imported is None else imported.parameter(name)
    if weight is None or weight.zero_point is not None:
        return None
    values, scale = weight.values.t().contiguous(), weight.scale.t().contiguous()
    return StoredRows(
        tensor_adapters.TorchTensor(values, name=f"{name}.values"),
        tensor_adapters.TorchTensor(scale, name=f"{name}.scale"),
    )
