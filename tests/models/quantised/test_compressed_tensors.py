"""Checkpoints that the library compressed-tensors writes, held against what it decompresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.weights import WeightTable
from nmexport.recipe import ModelSection

from tests.support.quantised_checkpoints import save_compressed_tensors, save_fp8

if TYPE_CHECKING:
    from pathlib import Path

DOWN = "model.layers.1.mlp.down_proj.weight"
KEPT = {
    "W3A16": ("int4", 4, False),
    "W4A16": ("int4", 4, False),
    "W4A16_ASYM": ("int4", 4, True),
    "W5A16": ("int8", 4, False),
    "W8A16": ("int8", 4, False),
    "W8A8": ("int8", 1, False),
}
"""Type, groups of `down_proj`, and whether there are zero points."""


@pytest.mark.parametrize("preset", [*KEPT, "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_it_reads_what_the_library_wrote(preset: str, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    original = save_compressed_tensors(tiny_llama, tmp_path / "model", preset)
    source = resolve(ModelSection(id=str(tmp_path / "model")))
    model = load_model(source)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, original.get_parameter(name)), name
    kept = WeightTable(model, source.folder).quantised(DOWN)
    if preset.startswith("FP8"):
        assert kept is None
        return
    assert kept is not None
    type_, groups, has_zero_points = KEPT[preset]
    assert (kept.type, len(kept.scale)) == (type_, groups)
    assert (kept.zero_point is not None) == has_zero_points
    assert torch.equal(kept.dequantised().t(), original.get_parameter(DOWN))


def test_fp8_in_blocks_that_do_not_divide_a_weight(tiny_llama: Path, tmp_path: Path) -> None:
    floats = save_fp8(tiny_llama, tmp_path / "model")
    expected = load_model(resolve(ModelSection(id=str(floats))))
    model = load_model(resolve(ModelSection(id=str(tmp_path / "model"))))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
