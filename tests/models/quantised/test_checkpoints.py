"""AWQ and GPTQ checkpoints: integers are read bit for bit, and make the model they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nmexport.models.layerwise import LayerwiseModel
from nmexport.models.loader import load_model
from nmexport.models.quantised.decoding import decode, unpack_bits
from nmexport.models.quantised.packing import PackedWeight
from nmexport.models.source import ModelSource, resolve
from nmexport.models.streaming import open_for_export
from nmexport.models.weights import WeightTable
from nmexport.progress import Silent
from nmexport.recipe import ModelSection

from tests.support.quantised_checkpoints import (
    Rounded,
    awq_tensors,
    gptq_tensors,
    packed,
    rounded,
    save_awq,
    save_gptq,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nmexport.sparsity.quantisation import QuantisedWeight

IDS = torch.arange(3, 19)[None]


def source_of(folder: Path) -> ModelSource:
    return resolve(ModelSection(id=str(folder)))


def decoded(layout: Any, weight: Rounded, tensors: dict[str, torch.Tensor]) -> QuantisedWeight:
    channels, outputs = weight.values.shape
    described = PackedWeight(
        module="m",
        layout=layout,
        bits=4 if layout == "awq" else tensors["qweight"].shape[0] * 32 // channels,
        shape=(outputs, channels),
        groups=len(weight.scale),
        parts={},
    )
    value = decode(described, tensors)
    assert not isinstance(value, torch.Tensor)
    return value


def formula(channels: int, outputs: int, groups: int, bits: int) -> Rounded:
    """Integers by a formula, for which the formats' own libraries were asked what they store."""
    k, o, g = torch.arange(channels)[:, None], torch.arange(outputs)[None], torch.arange(groups)
    top = 2**bits
    scale = (1 + (g[:, None] * outputs + o) % 5).half() / 8
    group = torch.arange(channels) * groups // channels
    return Rounded((3 * k + 5 * o + k * o) % top, (7 * g[:, None] + o) % top, scale, group)


# Words that AutoAWQ 0.2.9 stores (`WQLinear_GEMM.from_linear`) and GPTQModel 7.7.0
# (`pack_cols`, `_revert_gptq_v1_qzeros_correction`) for `formula`.
AWQ_WORDS = [972416160, -1317180376, 972416160, -1317180376]
AWQ_ZEROS = [[1966171168, -38146904] * 2, [-324478057, 1679840031] * 2]
GPTQ_WORDS = {
    2: [1431655765] * 4,
    3: [1295307597, -749914925, 886263092, 1295307597],
    4: [496311701] * 4,
    8: [286066949, 555555093, 825043237, 1094531381],
}
GPTQ_ZEROS = {
    2: ([-1819044973] * 2, [-454761244] * 2),
    3: ([1205220423, 877123124, -701216810], [-1996831096, -964101434, -87652102]),
    4: ([1698898191, -305419897] * 2, [1985229328, -19088744] * 2),
    8: (
        [0x020100FF, *(0x06050403 + 0x04040404 * word for word in range(7))],
        [0x03020100 + 0x04040404 * word for word in range(8)],
    ),
}


def test_the_words_are_those_of_autoawq() -> None:
    weight = formula(32, 32, 2, 4)
    stored = awq_tensors(weight)
    assert stored["qweight"][0].tolist() == AWQ_WORDS
    assert stored["qzeros"].tolist() == AWQ_ZEROS
    read = decoded("awq", weight, stored)
    assert (read.type, read.channel_order) == ("uint4", None)
    assert torch.equal(read.values.long(), weight.values)
    assert read.zero_point is not None
    assert torch.equal(read.zero_point.long(), weight.zeros)
    assert torch.equal(read.scale, weight.scale.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_the_words_are_those_of_gptqmodel(bits: int, version: int) -> None:
    weight = formula(64, 32, 2, bits)
    stored = gptq_tensors(weight, bits, version=version)
    assert stored["qweight"][:4, 1].tolist() == GPTQ_WORDS[bits]
    assert stored["qzeros"][0].tolist() == GPTQ_ZEROS[bits][version - 1]
    read = decoded("gptq" if version == 1 else "gptq_v2", weight, stored)
    less = 128 if bits == 8 else 0  # as int8 holds them
    assert read.type == ("int8" if bits == 8 else "uint4")
    assert torch.equal(read.values.long() + less, weight.values)
    assert read.zero_point is not None
    assert torch.equal(read.zero_point.long() + less, weight.zeros)
    assert torch.equal(read.dequantised().t(), weight.floats())


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_packed_values_come_back(bits: int, rows: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(2**bits, (rows, 32 * blocks), generator=generator)
    assert torch.equal(unpack_bits(packed(values, bits), bits).long(), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_symmetric_weight_needs_no_zero_points(bits: int) -> None:
    weight = rounded(torch.randn(8, 64), bits, symmetric=True)
    read = decoded("gptq", weight, gptq_tensors(weight, bits))
    assert (read.type, read.zero_point) == ("int8" if bits == 8 else "int4", None)
    assert torch.equal(read.values.long(), weight.values - 2 ** (bits - 1))
    assert torch.equal(read.dequantised().t(), weight.floats())


def test_act_order_is_an_order_of_channels() -> None:
    weight = rounded(torch.randn(8, 128), shuffled=True)
    read = decoded("gptq", weight, gptq_tensors(weight))
    order = read.channel_order
    assert order is not None
    assert order.dtype == torch.int32
    groups = weight.group[order.long()]
    assert torch.equal(groups, torch.arange(128) // 32)
    for group in groups.unique():  # of one group, channels stay in their order
        assert bool((order[groups == group].diff() > 0).all())
    assert torch.equal(read.values.long(), weight.values[order.long()])
    assert torch.equal(read.dequantised().t(), weight.floats())


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


SAVED: dict[str, Callable[[Path, Path], Path]] = {
    "awq": save_awq,
    "gptq": save_gptq,
    "gptq-asymmetric": lambda plain, folder: save_gptq(plain, folder, symmetric=False),
    "gptq-act-order": lambda plain, folder: save_gptq(plain, folder, act_order=True),
    "gptq-8": lambda plain, folder: save_gptq(plain, folder, bits=8, version=2, size=64),
}


@pytest.mark.parametrize("kind", SAVED)
def test_all_loaders_read_what_the_integers_stand_for(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "quantised"
    floats = load_model(source_of(SAVED[kind](tiny_llama, folder)))
    source = source_of(folder)
    model = load_model(source)
    for name, parameter in floats.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert torch.equal(logits(model), logits(floats))
    assert not hasattr(model.config, "quantization_config")
    opened = open_for_export(source, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(opened.parameter(name), floats.get_parameter(name))
    LayerwiseModel(source).run(IDS, progress=Silent(), label="")
    table = WeightTable(model, folder)
    kept = table.quantised(name)
    assert kept is not None
    assert torch.equal(kept.dequantised().t(), floats.get_parameter(name))
    assert table.quantised("lm_head.weight") is None
    assert table.quantised("model.norm.weight") is None
