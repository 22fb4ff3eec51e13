"""Folding: a dense linear, calibrated and learned constants -> the inputs of one NMLinear.

    z = x - eta,  s = z where kept                          (the shift eta: see the table)
    y = o * (W (nu d s + eta)) + B^T A^T s + c + b          what calibration and learning mean
      = s @ W' + bias'                                      what the op computes

Where a phase stays dense, its tokens meet the same weight, W itself; their bias is c:

    y = (d nu s) @ W + bias'      or      x @ W + c

| constant | folds into | where a phase stays dense |
|---|---|---|
| input scale d, or static nu | rows of W' | `value_scale` |
| output gain o | columns of W' | - |
| compensation A B | added to W' | - |
| remainder A B | taken from W'; its product stays beside the op | - |
| static or learned shift | `shift`, and `bias' = c + b + o * (W eta)` | the same |
| shift per token | `shift_weight`: o times the column sums of W | the same |
| own bias c | `bias'` | `bias'`, and `dense_bias` |

Sums are taken over the unscaled weight, in float64, before W' and bias' are rounded to T. At the
end whatever lies along K is gathered: see "Gather first" in the op contract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nmexport.sparsity.linear import bias_of

if TYPE_CHECKING:
    from torch import nn

    from nmexport.sparsity.linear import Behaviour, Constants

_ALONG_CHANNELS = ("W", "shift", "score_scale", "value_scale", "dense_scale")


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """Learned constants of one linear, in X's own channel order; None was not learned."""

    shift: torch.Tensor | None = None
    """`[K]` float32, takes the place of the calibrated one (L-PTS)."""
    input_scale: torch.Tensor | None = None
    """`[K]` float32, d (LS); takes the place of a static nu, at which it started."""
    output_scale: torch.Tensor | None = None
    """`[O]` float32, o."""
    bias: torch.Tensor | None = None
    """`[O]` float32, b: added to the linear's own bias."""
    low_rank_in: torch.Tensor | None = None
    """`[K, r]` float32, A."""
    low_rank_out: torch.Tensor | None = None
    """`[r, O]` float32, B."""


NOTHING_LEARNED = Corrections()


def fold(
    linear: nn.Linear,
    behaviour: Behaviour,
    constants: Constants,
    corrections: Corrections = NOTHING_LEARNED,
    *,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Fold constants into the weight and bias.

    Args:
        linear: The dense linear.
        behaviour: Attributes of the op.
        constants: Calibrated constants; those that learning started from.
        corrections: What was learned.
        dtype: T.

    Returns:
        `W [K, O]` T, and where used `bias [O]` T, `shift` float32, `shift_weight [O]` float32,
        `score_scale [K]` float32, `channel_order [K]` int32, `value_scale [K]` float32,
        `dense_bias [O]` T, all in gathered order;
        `remainder_in [K, r]` T in X's own order, `remainder_out [r, O]` T. Contiguous, on the CPU.

    Raises:
        ValueError: if constants that change the weight meet a phase that stays dense.
    """
    # In float64 on a GPU this is bandwidth; on a host it is most of a large model's fold.
    weight = linear.weight.detach().t().double()  # [K, O], where the linear is
    shift = constants.shift if corrections.shift is None else corrections.shift
    own = bias_of(linear)
    if behaviour.phase == "all":
        folded = {"W": _folded_weight(weight, constants, corrections).to(dtype)}
    else:
        folded = {"W": weight.to(dtype), **beside_dense(own, len(weight), constants, corrections)}
    bias = bias_with_shift(own, weight, shift, corrections)
    if bias is not None:
        folded["bias"] = bias.to(dtype)
    if behaviour.dynamic_shift:
        folded["shift_weight"] = _gained(weight.sum(dim=0), corrections).float()
    if constants.remainder is not None:
        folded["remainder_in"] = constants.remainder.inner.to(dtype)
        folded["remainder_out"] = constants.remainder.outer.to(dtype)
    folded |= _selecting(constants, shift)
    if "dense_bias" in folded:
        folded["dense_bias"] = folded["dense_bias"].to(dtype)
    return {name: tensor.detach().contiguous().cpu() for name, tensor in _gathered(folded).items()}


def beside_dense(
    own: torch.Tensor | None, channels: int, constants: Constants, corrections: Corrections
) -> dict[str, torch.Tensor]:
    """Fold around a weight that tokens of another phase meet as it is.

    Args:
        own: c `[O]`, the linear's bias.
        channels: K.
        constants: Calibrated constants.
        corrections: What was learned.

    Returns:
        Where used `value_scale [K]` float32, in X's own order, and `dense_bias [O]`.

    Raises:
        ValueError: if constants change the weight.
    """
    changing = (constants.remainder, corrections.output_scale, corrections.low_rank_in)
    if any(part is not None for part in changing):
        raise ValueError("a phase that stays dense needs the weight as it is")
    made = {"value_scale": value_scale(channels, constants, corrections), "dense_bias": own}
    return {name: tensor.detach().clone() for name, tensor in made.items() if tensor is not None}


def value_scale(
    channels: int, constants: Constants, corrections: Corrections
) -> torch.Tensor | None:
    """Return d, or a static nu for all channels: `[K]` float32 in X's own order; None is 1."""
    if corrections.input_scale is not None:
        return corrections.input_scale.detach().cpu().float()
    return None if constants.nu is None else torch.full((channels,), constants.nu)


def selection(
    constants: Constants, corrections: Corrections = NOTHING_LEARNED
) -> dict[str, torch.Tensor]:
    """Those of the op's inputs that decide what is kept, in gathered order; see `fold`."""
    shift = constants.shift if corrections.shift is None else corrections.shift
    return {
        name: tensor.detach() for name, tensor in _gathered(_selecting(constants, shift)).items()
    }


def _selecting(constants: Constants, shift: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Shift, score scale and order. Linears of one site share these: each gets its own copy."""
    kept = {
        "shift": shift,
        "score_scale": constants.score_scale,
        "channel_order": constants.channel_order,
    }
    return {name: value.cpu().clone() for name, value in kept.items() if value is not None}


def _folded_weight(
    weight: torch.Tensor, constants: Constants, corrections: Corrections
) -> torch.Tensor:
    """W' `[K, O]` float64."""
    if constants.remainder is not None:
        inner, outer = constants.remainder.inner, constants.remainder.outer
        weight = weight - _product(inner, outer, weight.device)
    if corrections.input_scale is not None:
        weight = _wide(corrections.input_scale, weight.device).unsqueeze(1) * weight
    elif constants.nu is not None:
        weight = constants.nu * weight
    weight = _gained(weight, corrections)
    if corrections.low_rank_in is None or corrections.low_rank_out is None:
        return weight
    return weight + _product(corrections.low_rank_in, corrections.low_rank_out, weight.device)


def _wide(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Constants in float64 beside the weight that they meet."""
    return values.detach().to(device).double()


def _product(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`[K, r]` and `[r, O]` -> `[K, O]` float64."""
    return _wide(left, device) @ _wide(right, device)


def bias_with_shift(
    own: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor | None,
    corrections: Corrections,
) -> torch.Tensor | None:
    """`c + o * (W eta) + b` `[O]` float64; None where all are absent.

    Args:
        own: c `[O]`, the linear's bias.
        weight: `[K, O]` float64, dense and unscaled, in X's own order, on any device.
        shift: eta, `[1]` or `[K]`.
        corrections: Gain o and bias b.
    """
    terms = []
    if own is not None:
        terms.append(_wide(own, weight.device))
    if shift is not None:
        moved = _wide(shift, weight.device).expand(weight.shape[0]) @ weight
        terms.append(_gained(moved, corrections))
    if corrections.bias is not None:
        terms.append(_wide(corrections.bias, weight.device))
    return torch.stack(terms).sum(dim=0) if terms else None


def _gained(outputs: torch.Tensor, corrections: Corrections) -> torch.Tensor:
    """Times the learned gain of each output: `[..., O]`."""
    gain = corrections.output_scale
    return outputs if gain is None else outputs * _wide(gain, outputs.device)


def _gathered(folded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The op's inputs with all that lies along K in the order of `channel_order`."""
    if "channel_order" not in folded:
        return folded
    order = folded["channel_order"].long()
    along = {
        name: folded[name].index_select(0, order.to(folded[name].device))
        for name in _ALONG_CHANNELS
        if name in folded and len(folded[name]) == len(order)  # a shift [1] is one for all
    }
    return {**folded, **along}
