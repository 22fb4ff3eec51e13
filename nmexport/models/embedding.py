"""The input embedding of a model: where it is, and how it is rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.sparsity.quantisation import rounded_rows

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle


def embedding_module(model: Any) -> tuple[str, nn.Module]:
    """Return the name and module of a causal language model's input embedding."""
    wanted = model.get_input_embeddings()
    return next((name, module) for name, module in model.named_modules() if module is wanted)


def embedding_names(model: Any) -> list[str]:
    """List all names of the input embedding's parameter, its own first; a tied one has several."""
    own = f"{embedding_module(model)[0]}.weight"
    table = model.get_parameter(own)
    parameters = model.named_parameters(remove_duplicate=False)
    return [own, *(name for name, value in parameters if value is table and name != own)]


def round_embedding(model: Any) -> RemovableHandle:
    """Let a model's input embedding return rows of 8 bits, until the handle is removed.

    A row is rounded by itself, so what is looked up may be rounded in place of the table.
    """

    def round_rows(_: nn.Module, __: Any, rows: torch.Tensor) -> torch.Tensor:
        values, scale = rounded_rows(rows.reshape(-1, rows.shape[-1]))
        grouped = values.to(rows.dtype).reshape(*scale.shape, -1)
        return (grouped * scale.unsqueeze(-1)).reshape(rows.shape)

    handle: RemovableHandle = model.get_input_embeddings().register_forward_hook(round_rows)
    return handle
