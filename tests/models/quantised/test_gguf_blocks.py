"""Blocks of a GGUF: taken apart, they stand for what the library gguf dequantises."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nmexport.models.quantised.gguf_blocks import gguf_weight, kept_type

# Type -> the op's type, channels that share a scale.
TYPES = {
    "Q8_0": ("int8", 32),
    "Q4_0": ("int4", 32),
    "Q4_1": ("uint4", 32),
    "Q5_0": ("int8", 32),
    "Q5_1": ("int8", 32),
    "Q2_K": ("uint4", 16),
    "Q3_K": ("int4", 16),
    "Q4_K": ("uint4", 32),
    "Q5_K": ("int8", 32),
    "Q6_K": ("int8", 16),
    "IQ4_NL": ("int8", 32),
    "IQ4_XS": ("int8", 32),
}
WITH_MINIMA = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}
# Where a block's scales in float16 begin.
HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(name: str, rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`[rows, bytes]` of any bits, but for the scales, which are numbers; some are zero."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    count = 512 // size
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * count, width), dtype=np.uint8)
    for place in HALVES.get(name, (0,)):
        scale = generator.normal(0, 1, len(blocks)).astype(np.float16)
        scale[generator.random(len(blocks)) < 0.2] = 0
        blocks[:, place : place + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


@given(
    name=st.sampled_from(sorted(TYPES)), rows=st.sampled_from([2, 4]), seed=st.integers(0, 2**20)
)
def test_blocks_stand_for_what_gguf_dequantises(name: str, rows: int, seed: int) -> None:
    data = random_blocks(name, rows, seed)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    kept = gguf_weight(data, name)
    type_, size = TYPES[name]
    assert (kept.type, len(kept.values) // len(kept.scale)) == (type_, size)
    found = kept.dequantised().t().numpy()
    if name not in WITH_MINIMA:
        np.testing.assert_array_equal(found, expected)
        assert kept.zero_point is None
        return
    assert kept.zero_point is not None
    assert kept.zero_point.dtype == torch.float32
    assert bool(torch.isfinite(kept.zero_point).all())
    # Two roundings of float32 where the library has two others.
    largest = np.abs(expected).reshape(rows, -1, size).max(-1).repeat(size, axis=1)
    minimum = (kept.zero_point * kept.scale).abs().t().numpy().repeat(size, axis=1)
    assert (np.abs(found - expected) <= 3e-7 * (largest + minimum)).all()


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q5_0", "Q4_0", "Q5_1"])
def test_weights_that_gguf_quantises(name: str) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    weight[1, 32:] = 0.75  # a block of equal weights has no scale in Q4_1
    data = gguf.quantize(weight, gguf.GGMLQuantizationType[name])
    found = gguf_weight(data, name).dequantised().t().numpy()
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    if name == "Q4_1":
        assert (found[1, 32:] == np.float32(0.75)).all()


@pytest.mark.parametrize("name", ["F16", "MXFP4", "IQ2_XXS", "TQ1_0"])
def test_types_that_no_type_of_the_op_holds(name: str) -> None:
    assert kept_type(name) is None
