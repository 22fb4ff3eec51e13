"""Balance channels between an operand and its weight, where both are rounded to 8 bits.

    x_k W_k = (v_k x_k) (W_k / v_k)

A block of an operand is rounded with one scale, that of its strongest channel, and an output with
one scale, that of its largest weight: beside these, weaker channels are lost. `v_k = (|W_k| /
|x_k|) ^ 1/2` would make both sides of a channel equally strong, but an output's scale has to serve
all channels and a block's only 32, so less is better. SmolLM2 with every linear in 8 bits, mean KL:
0.0060 without, 0.0047 with the square root, 0.0036 with a power of 0.35, 0.0033 with 1/4.
SmoothQuant (arXiv 2211.10438) does so with largest values in place of norms. The op multiplies by v
as `value_scale`, so what comes before it stays as it is.
"""

from __future__ import annotations

import torch

_POWER = 0.25
_WIDEST = 32.0
"""Factors lie between this and its inverse: channels that are hardly ever met stay bounded."""


def balancing_factors(strengths: torch.Tensor, row_norms: torch.Tensor) -> torch.Tensor:
    """Find what an operand is multiplied by, and its weight divided by.

    Args:
        strengths: `[K]`, root mean square of each channel.
        row_norms: `[K]`, norm of each channel's weights, over all linears that read the operand.

    Returns:
        `[K]` float32; 1 where a channel or its weights are all zero.
    """
    ratios = row_norms.double().log() - strengths.double().log()
    known = ratios.isfinite()
    if not bool(known.any()):
        return torch.ones(len(ratios))
    centred = torch.where(known, ratios - ratios[known].mean(), 0.0)
    return (_POWER * centred).exp().clamp(1 / _WIDEST, _WIDEST).float()
