"""Replaces parts of a model: linears by dotted name, and its attention."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn


def replace_linears(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace the model's `name` by `modules[name]`, in place.

    Returns:
        The modules that were there, by the same names: handing them back to this function
        restores the model.

    Raises:
        AttributeError: if the model has no module of a given name; nothing is replaced then.
    """
    replaced = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return replaced


@contextlib.contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Do the same for a `with` block."""
    replaced = replace_linears(model, modules)
    try:
        yield
    finally:
        replace_linears(model, replaced)


@contextlib.contextmanager
def swapped_attention(model: Any, name: str) -> Iterator[None]:
    """Switch a model to another of transformers' registered attentions for a `with` block.

    Args:
        model: A Hugging Face model that supports attention backends.
        name: Of the attention and its mask, as they are registered.
    """
    before = model.config._attn_implementation  # noqa: SLF001 (transformers has no public getter)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
