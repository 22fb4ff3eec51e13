"""What export cannot take is refused before calibration, with no weight read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nmexport.models.families import EXPORTED, refuse_kind
from nmexport.models.layerwise import skeleton
from nmexport.models.streaming import fake_parameters
from nmexport.models.tracing import cache_shapes, trace

if TYPE_CHECKING:
    import torch

    from nmexport.models.source import ModelSource


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
    cache_shapes(model)
    if model.config.model_type not in EXPORTED:
        head = model.get_output_embeddings()
        linears = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        trace(model, linears)
