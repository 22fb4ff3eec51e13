"""Weights in int8: symmetric, a scale for each output or for each group of channels of an output.

Rounding is to the nearest of 255 levels of the largest weight that shares the scale. The op
contract says what they stand for: `W[k, o] * weight_scale[k // (K / G), o]`.
"""

from __future__ import annotations

import re

import torch

from nmexport.errors import RecipeError

LEVELS = 127
GROUP = 16
"""Channels that share a scale are a multiple of this: no N:M group of up to 16 straddles."""

FORMS = f"float, int8 (a scale an output), or int8:CHANNELS with CHANNELS a multiple of {GROUP}"
_FORM = re.compile(r"float|int8(?::(\d+))?")


def check_form(form: str) -> str:
    """The form itself.

    Raises:
        RecipeError: if it is none.
    """
    match = _FORM.fullmatch(form)
    if match is None or (match[1] is not None and (int(match[1]) < GROUP or int(match[1]) % GROUP)):
        raise RecipeError(f"weights cannot be {form!r}.", allowed=FORMS)
    return form


def quantised(folded: dict[str, torch.Tensor], form: str, *, name: str) -> dict[str, torch.Tensor]:
    """Constants of one linear with its weights in a form.

    Args:
        folded: `W [K, O]` and the others, by their names in the op contract.
        form: See `FORMS`.
        name: Of the linear, for the message.

    Returns:
        The same for `float`; else with `W [K, O]` int8 and `weight_scale [G, O]` float32.

    Raises:
        RecipeError: if the form is none, or its groups do not divide K.
    """
    groups = scale_groups(form, folded["W"].shape[0], name=name)
    if groups is None:
        return folded
    levels, scale = quantise(folded["W"].float(), groups)
    return {**folded, "W": levels, "weight_scale": scale}


def scale_groups(form: str, channels: int, *, name: str) -> int | None:
    """How many scales each output of a linear has; None for `float`.

    Args:
        form: See `FORMS`.
        channels: K of the linear.
        name: Of the linear, for the message.

    Raises:
        RecipeError: if the form is none, or its groups do not divide K.
    """
    if check_form(form) == "float":
        return None
    group = int(form.partition(":")[2] or channels)
    if channels % group:
        raise RecipeError(
            f"weights {form} does not fit {name}: its {channels} channels are no multiple of "
            f"{group}.",
            allowed=FORMS,
        )
    return channels // group


def quantise(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[K, O]` float32 -> int8 levels `[K, O]` and scales `[groups, O]` float32."""
    grouped = weight.reshape(groups, -1, weight.shape[1])
    scale = grouped.abs().amax(dim=1, keepdim=True) / LEVELS
    # A group of zeros has no scale: any will do.
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = (grouped / safe).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return levels.reshape(weight.shape), safe.squeeze(1)


def dequantised(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Dequantise a weight `[K, O]` to float32; `scale` is `[G, O]`, or None for floats."""
    wide = weight.to(torch.float32)
    if scale is None:
        return wide
    grouped = wide.reshape(scale.shape[0], -1, weight.shape[1])
    return (grouped * scale.unsqueeze(1)).reshape(weight.shape)
