"""Linears to check: every option, odd sizes, ties, outliers, activations recorded from a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from arguments import DTYPES, Layer

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {
    "o": (4096, 4096),
    "qkv": (4096, 6144),
    "gate": (4096, 14336),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
}
# An option is a letter: b bias, s shift by channel, 1 shift of one value, w score scale, a value
# scale, o channel order, d dynamic shift, v variance correction.
OPTIONS = ("", "b", "bs", "1w", "bdv", "o", "a", "wo", "oa", "dvowb", "dvowba")
PATTERNS = (
    *((2, 4), (4, 8), (16, 32), (1, 4), (3, 8), (12, 16)),
    *((16, 16), (1, 1), (5, 10), (7, 48), (32, 64), (1, 64)),
)
ODD_SHAPES = ((16, 8), (48, 8), (576, 192), (1536, 576), (4096, 1000), (576, 101), (64, 1))


class Case(NamedTuple):
    """One linear to make: its sizes, its options as letters, and the kind of its activations."""

    dtype: torch.dtype
    tokens: int
    channels: int
    outputs: int
    n: int = 8
    m: int = 16
    options: str = ""
    kind: str = "gauss"
    """Activations: gauss, ties (small integers) or outliers (channels of very different size)."""


def make_layer(case: Case, device: str = "cuda") -> Layer:
    """The linear of a case, its tensors drawn at random."""
    channels, outputs, options = case.channels, case.outputs, case.options
    x = torch.randn(case.tokens, channels, device=device)
    if case.kind == "ties":
        x = torch.randint(-2, 3, (case.tokens, channels), device=device).float()
    if case.kind == "outliers":
        x = x * torch.exp(2.0 * torch.randn(channels, device=device)) + 0.5
    w = torch.randn(channels, outputs, device=device) / math.sqrt(channels)
    layer = Layer(x.to(case.dtype), w.to(case.dtype), case.n, case.m)
    if "b" in options:
        layer.bias = torch.randn(outputs, device=device).to(case.dtype)
    if "s" in options:
        layer.shift = torch.randn(channels, device=device) * 0.3
    if "1" in options:
        layer.shift = torch.full((1,), 0.21, device=device)
    if "w" in options:
        layer.score_scale = torch.rand(channels, device=device) + 0.1
    if "a" in options:
        layer.value_scale = torch.randn(channels, device=device)
    if "o" in options:
        layer.channel_order = torch.randperm(channels, device=device).int()
    if "d" in options:
        layer.dynamic_shift = True
        layer.shift_weight = layer.w.float().sum(0)
    layer.variance_correction = "v" in options
    return layer


def check_cases() -> list[Case]:
    """Every case to check, small ones in all types first, then the shapes that are timed."""
    cases = []
    for dtype in DTYPES:
        for tokens in (1, 2, 3, 4):
            for options in OPTIONS:
                cases.append(Case(dtype, tokens, 1024, 768, 8, 16, options, "outliers"))
        for n, m in PATTERNS:
            cases.append(Case(dtype, 1, m * 24, 264, n, m, "bv"))
            cases.append(Case(dtype, 3, m * 24, 264, n, m, "bo", "ties"))
            cases.append(Case(dtype, 2, m * 24, 264, n, m, "bosaw"))
        for channels, outputs in ODD_SHAPES:
            cases.append(Case(dtype, 1, channels, outputs, 8, 16, "b"))
            cases.append(Case(dtype, 4, channels, outputs, 8, 16, "bdv"))
    for channels, outputs in [*SHAPES.values(), (4096, 1024)]:
        cases.append(Case(torch.bfloat16, 1, channels, outputs))
        cases.append(Case(torch.bfloat16, 1, channels, outputs, 8, 16, "dvwob", "outliers"))
        cases.append(Case(torch.float16, 2, channels, outputs, 8, 16, "b", "ties"))
        for options in ("o", "ow", "owsb", "bd", "v"):
            cases.append(Case(torch.bfloat16, 1, channels, outputs, 8, 16, options, "outliers"))
    return cases


def recorded_layers(path: Path) -> list[tuple[str, Layer]]:
    """Layers whose inputs were recorded from a real model: an .npz of float16 arrays [tokens, K]."""
    layers = []
    with np.load(path) as arrays:
        for name in arrays.files:
            x = torch.from_numpy(arrays[name]).cuda()
            for dtype in DTYPES:
                for tokens in (1, 2, 3, 4):
                    first = 7 * tokens
                    layer = make_layer(Case(dtype, tokens, x.shape[1], 576, options="o"))
                    layer.x = x[first : first + tokens].to(dtype).contiguous()
                    layers.append((f"recorded {name} {dtype} {tokens}", layer))
    return layers
