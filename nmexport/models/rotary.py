"""Makes rotary embeddings with length-dependent frequencies a function of the positions.

Transformers keeps the frequencies of the last call in the module and replaces them when the length
asks for others, which no tracer follows. While a model is exported, they are computed from the
positions at each call: for `longrope` one of two sets, for `dynamic` a new base.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def frequencies_from_positions(model: nn.Module) -> Iterator[None]:
    """Recompute length-dependent frequencies at each call."""
    replaced = [module for module in model.modules() if _length_types(module)]
    try:
        for module in replaced:
            module.forward = functools.partial(_forward, module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _length_types(module: nn.Module) -> set[str]:
    """List the rope types of a rotary embedding that depend on the length."""
    kinds = getattr(module, "rope_type", None)
    named = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return {
        kind
        for kind in named
        if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)
    }


class _WithFrequencies:
    """A rotary module as its own forward sees it, with other frequencies."""

    def __init__(self, module: nn.Module, name: str, frequencies: Tensor) -> None:
        self._module = module
        setattr(self, name, frequencies)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _forward(
    module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """Run the module's own forward on the frequencies of this length."""
    own = inspect.unwrap(type(module).forward)
    kinds: Any = module.rope_type
    kind = kinds if layer_type is None else kinds[layer_type]
    options = {} if layer_type is None else {"layer_type": layer_type}
    if kind != "longrope" and "dynamic" not in kind:
        return own(module, x, position_ids, **options)
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = _frequencies(module, kind, prefix, position_ids, layer_type)
    return own(
        _WithFrequencies(module, f"{prefix}inv_freq", frequencies), x, position_ids, **options
    )


def _frequencies(
    module: nn.Module, kind: str, prefix: str, position_ids: Tensor, layer_type: str | None
) -> Tensor:
    """Compute the frequencies `[D / 2]` for the longest of the sequences."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = torch.max(position_ids) + 1
    config: Any = module.config
    known: Tensor = getattr(module, f"{prefix}original_inv_freq")
    parameters = (
        config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    )
    longest = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    compute = functools.partial(
        ROPE_INIT_FUNCTIONS[kind], config, position_ids.device, layer_type=layer_type
    )
    other, _ = compute(seq_len=longest + 1 if kind == "longrope" else length)
    limit = longest if kind == "longrope" else config.max_position_embeddings
    return torch.where(length > limit, other, known)
