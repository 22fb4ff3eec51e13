"""Checks every case against float64 before anything is timed; a failure ends the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from cases import Case, check_cases, make_layer, recorded_layers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from arguments import Layer
    from library import Lab

DYNAMIC_MASK_SLACK = 4
"""Places where a dynamic shift's mask may differ: the mean's order of summation moves a last bit."""


def check(lab: Lab, recorded: Path | None = None) -> None:
    """Holds every case to the reference.

    Raises:
        SystemExit: a case failed; the first dozen are named.
    """
    count, worst, failures = 0, 0.0, []
    for name, layer in _layers(recorded):
        count += 1
        excess, failure = compare(lab, layer)
        worst = max(worst, excess)
        if failure is not None:
            failures.append(f"{name}: {failure}")
    special = special_values(make_layer(Case(torch.float32, 1, 64, 64)))
    if not torch.equal(lab.mask(special)[1].bool(), special.reference()[0]):
        failures.append("special values: mask differs")
    lab.results["check"] = {"cases": count, "worst": worst, "failures": failures}
    print(f"check: {count} cases, worst error {worst:.3f} of the allowed, {len(failures)} failures")
    if failures:
        raise SystemExit("\n".join(f"  FAILED {failure}" for failure in failures[:12]))


def _layers(recorded: Path | None) -> Iterator[tuple[str, Layer]]:
    for case in check_cases():
        yield str(case), make_layer(case)
    if recorded is not None:
        yield from recorded_layers(recorded)


def compare(lab: Lab, layer: Layer) -> tuple[float, str | None]:
    """The error in units of what is allowed, and what is wrong; None where nothing is."""
    keep, expected_s, nu, expected = layer.reference()
    y = lab.decode(layer)
    again = lab.decode(layer)
    s, kept, _, nu_mask = lab.mask(layer)
    excess = worst_excess(y, expected, layer.x.shape[1])
    same_bits = torch.equal(y.view(torch.uint8), again.view(torch.uint8))
    mask_off = int((kept.bool() != keep).sum())
    by_channel = list(lab.mask(layer, is_gathered=False)[:2])
    if layer.channel_order is not None:
        by_channel = [values[:, layer.channel_order.long()] for values in by_channel]
    s_right = torch.equal(s, by_channel[0]) and torch.equal(kept, by_channel[1])
    if layer.dynamic_shift:  # the mean's order of summation may move the last bit
        agreed = kept.bool() & keep
        s_right = s_right and torch.allclose(
            s.float()[agreed], expected_s[agreed], rtol=1e-2, atol=1e-4
        )
    else:
        s_right = s_right and torch.equal(s, expected_s.to(s.dtype))
    nu_right = not layer.variance_correction or torch.allclose(
        nu_mask.double(), nu[:, 0], rtol=1e-4
    )
    mask_right = mask_off == 0 or (layer.dynamic_shift and mask_off <= DYNAMIC_MASK_SLACK)
    if excess <= 1 and same_bits and mask_right and s_right and nu_right:
        return excess, None
    return excess, (
        f"excess {excess:.2f} bits {same_bits} mask off {mask_off} s {s_right} nu {nu_right}"
    )


def special_values(layer: Layer) -> Layer:
    """The layer with NaN, infinities, zeros of both signs and denormals in its first token."""
    layer.x[0, :20] = torch.tensor(
        [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45] + [1.0] * 12
    )
    return layer


def worst_excess(y: torch.Tensor, reference: torch.Tensor, channels: int) -> float:
    """Largest error in units of what the contract allows; at most 1 passes, NaN never does."""
    relative = 1e-5 * math.sqrt(channels)
    scale = torch.maximum(reference.abs(), reference.square().mean().sqrt())
    allowed = relative * scale
    bits = {torch.float16: 10, torch.bfloat16: 7}.get(y.dtype)
    if bits is not None:
        ulp = torch.exp2(torch.floor(torch.log2(reference.abs().clamp_min(2.0**-14))) - bits)
        allowed = allowed + 2 * ulp
    excess = float(((y.double() - reference).abs() / allowed).max())
    return excess if math.isfinite(excess) else math.inf
