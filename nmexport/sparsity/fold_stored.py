"""Folding onto a weight that is stored already: its integers stay bit for bit.

As `nmexport.sparsity.fold`, but what cannot go into the weight goes elsewhere:

| constant | goes into |
|---|---|
| input scale d | `value_scale` |
| output gain o, static nu | `weight_scale`; where a phase stays dense, nu too into `value_scale` |
| own bias c | `bias'`; where a phase stays dense, `dense_bias` too |
| static or learned shift | `shift`, and `bias' = c + b + o * (W eta)` |
| shift per token | `shift_weight`: o times the column sums of W |
| a channel order | rows change places, scale groups stay whole |

Compensation and remainder (`low-rank`, `r-sparse`) would change the weight: see `PARTS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nmexport.sparsity.fold import (
    NOTHING_LEARNED,
    beside_dense,
    bias_with_shift,
    selection,
)

if TYPE_CHECKING:
    from nmexport.sparsity.fold import Corrections
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.parts import Part
    from nmexport.sparsity.quantisation import QuantisedWeight

PARTS: tuple[Part, ...] = ("shift", "input_scale", "output_scale", "bias")
"""What can be learned for a stored weight."""


def fold_stored(
    weight: QuantisedWeight,
    own_bias: torch.Tensor | None,
    behaviour: Behaviour,
    constants: Constants,
    corrections: Corrections = NOTHING_LEARNED,
    *,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Fold constants around a stored weight.

    Args:
        weight: The weight, as it was stored.
        own_bias: `[O]`, the linear's.
        behaviour: Attributes of the op.
        constants: Calibrated constants; their order keeps scale groups whole, see
            `order_within_groups`.
        corrections: What was learned.
        dtype: T.

    Returns:
        As `fold`, with `W` of the stored type, `weight_scale`, and where used `weight_zero_point`
        and `value_scale [K]` float32.

    Raises:
        ValueError: if a correction has no place, changes a weight that has to stay dense, or the
            order tears scale groups apart.
    """
    if constants.remainder is not None or corrections.low_rank_in is not None:
        raise ValueError("a stored weight takes no compensation and no remainder")
    order = constants.channel_order if constants.channel_order is not None else weight.channel_order
    gathered = replace(constants, channel_order=order)
    folded = {**selection(gathered, corrections), **_rows(weight, order)}
    meant = weight.dequantised().double()
    shift = constants.shift if corrections.shift is None else corrections.shift
    bias = bias_with_shift(own_bias, meant, shift, corrections)
    if bias is not None:
        folded["bias"] = bias.to(dtype)
    if behaviour.phase != "all":
        folded |= beside_dense(own_bias, len(meant), constants, corrections)
    else:
        folded |= _around_all(folded["weight_scale"], constants, corrections)
    if behaviour.dynamic_shift:
        sums = meant.sum(dim=0)
        learned = corrections.output_scale
        folded["shift_weight"] = (sums if learned is None else sums * learned.cpu()).float()
    if "value_scale" in folded and order is not None:
        folded["value_scale"] = folded["value_scale"][order.long()]
    if "dense_bias" in folded:
        folded["dense_bias"] = folded["dense_bias"].to(dtype)
    return {name: tensor.detach().contiguous().cpu() for name, tensor in folded.items()}


def _around_all(
    weight_scale: torch.Tensor, constants: Constants, corrections: Corrections
) -> dict[str, torch.Tensor]:
    """Fold what every token meets alike: `weight_scale`, and `value_scale` in X's own order."""
    folded = {}
    gain = _gain(constants, corrections)
    if gain is not None:
        folded["weight_scale"] = weight_scale.float() * gain
    if corrections.input_scale is not None:
        folded["value_scale"] = corrections.input_scale.detach().cpu().float()
    return folded


def order_within_groups(order: torch.Tensor | None, weight: QuantisedWeight) -> torch.Tensor | None:
    """The nearest order that leaves the channels of each scale group neighbours.

    Args:
        order: `[K]` int32, the order that is wished for; None wishes for none.
        weight: The stored weight.

    Returns:
        `[K]` int32: scale groups as the weight has them, and inside each the wished order. None
        where neither has one.
    """
    groups = len(weight.scale)
    if order is None or groups == 1:
        return weight.channel_order if order is None else order
    group_of = _group_of(weight)
    # Stable: inside a group channels keep the order that they come in.
    by_group = torch.argsort(group_of[order.long()], stable=True)
    return order[by_group]


def keeps_groups(order: torch.Tensor | None, weight: QuantisedWeight) -> bool:
    """Tell whether an order leaves the channels of each scale group neighbours.

    Args:
        order: `[K]` int32; None is as they come.
        weight: The stored weight.
    """
    if order is None:
        return weight.channel_order is None
    groups = _group_of(weight)[order.long()].reshape(len(weight.scale), -1)
    return not bool((groups != groups[:, :1]).any())


def _group_of(weight: QuantisedWeight) -> torch.Tensor:
    """The scale group of each channel, `[K]`, in the input's own order."""
    channels, groups = len(weight.values), len(weight.scale)
    groups_of_rows = torch.arange(channels) // (channels // groups)
    if weight.channel_order is None:
        return groups_of_rows
    own = torch.empty_like(groups_of_rows)
    own[weight.channel_order.long()] = groups_of_rows
    return own


def _rows(weight: QuantisedWeight, order: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Stored values, scales and zero points with rows in an order.

    Raises:
        ValueError: if channels of a scale group are no neighbours in it.
    """
    stored = {"W": weight.values, "weight_scale": weight.scale}
    if weight.zero_point is not None:
        stored["weight_zero_point"] = weight.zero_point
    if order is None or order is weight.channel_order:
        return stored
    channels, groups = len(weight.values), len(weight.scale)
    blocks = _group_of(weight)[order.long()].reshape(groups, channels // groups)
    if bool((blocks != blocks[:, :1]).any()):
        raise ValueError("the channel order tears groups of channels with one scale apart")
    rows = order.long()
    if weight.channel_order is not None:
        rows = torch.argsort(weight.channel_order.long())[rows]
    moved = {name: tensor[blocks[:, 0]] for name, tensor in stored.items() if name != "W"}
    return {"W": weight.values[rows], **moved}


def _gain(constants: Constants, corrections: Corrections) -> torch.Tensor | float | None:
    """Factor of each output: learned gain, and a static nu where no input scale replaces it."""
    nu = None if corrections.input_scale is not None else constants.nu
    learned = corrections.output_scale
    if learned is None:
        return nu
    return learned.detach().cpu().float() * (1.0 if nu is None else nu)
