"""Weights in int8: how they are rounded, and that they travel through fold and export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from nmexport.errors import RecipeError
from nmexport.graph import checks
from nmexport.models.swap import replace_linears
from nmexport.recipe import ModelSection
from nmexport.runtimes import native
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.quantisation import (
    QuantisedWeight,
    check_form,
    dequantised,
    quantise,
    quantised,
)
from nmexport.stages.export import write_models
from pydantic import ValidationError

from tests.support.exported import PATTERN, linears_of, load, onnx_logits, specs_of, torch_logits
from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.stages.export import TracedModel


@pytest.mark.parametrize("groups", [1, 4])
def test_rounding_is_to_the_nearest_of_255_levels(groups: int) -> None:
    weight = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    levels, scale = quantise(weight, groups)
    assert levels.dtype == torch.int8
    assert scale.shape == (groups, 10)
    error = (dequantised(levels, scale) - weight).abs().reshape(groups, -1, 10)
    assert bool((error <= scale.unsqueeze(1) * 0.5000001).all())
    assert bool((levels.reshape(groups, -1, 10).abs().amax(dim=1) == 127).all())


def test_zeros_stay_zeros() -> None:
    levels, scale = quantise(torch.zeros(32, 3), 2)
    assert bool((dequantised(levels, scale) == 0).all())
    assert bool(torch.isfinite(scale).all())


def test_a_stored_weight_stands_for_values_less_zero_point_times_scale() -> None:
    values = torch.tensor([[3, -8], [7, 0]], dtype=torch.int8).repeat(16, 1)
    stored = QuantisedWeight(
        values=values,
        scale=torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16),
        type="int4",
        zero_point=torch.tensor([[1, -2], [0, 7]], dtype=torch.int8),
        channel_order=torch.arange(32, dtype=torch.int32).flip(0),
    )
    assert stored.bits == 4
    own = stored.dequantised()
    assert own.dtype == torch.float32
    # Row 0 of the values is channel 31's.
    assert own[31].tolist() == [1.0, -12.0]
    assert own[0].tolist() == [7.0, -1.75]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": torch.full((32, 2), 8, dtype=torch.int8)}, "leaves the range of int4"),
        ({"values": torch.zeros(32, 2)}, "held in torch.int8, not torch.float32"),
        ({"values": torch.zeros(32, 3, dtype=torch.int8)}, "two a byte"),
        ({"scale": torch.ones(4, 2)}, "4 groups of scales for 32 channels"),
        ({"scale": torch.ones(2, 3)}, "not \\[2, 2\\]"),
        ({"zero_point": torch.zeros(1, 2, dtype=torch.int8)}, "not \\[2, 2\\]"),
        ({"zero_point": torch.full((2, 2), -9, dtype=torch.int8)}, "leaves the range"),
        ({"zero_point": torch.zeros(2, 2).double()}, "zero point is torch.float64"),
        ({"type": "float8e4m3fn"}, "held in torch.float8_e4m3fn"),
        ({"type": "int2"}, "int2 weights"),
    ],
)
def test_a_stored_weight_of_tensors_that_do_not_fit_is_refused(
    change: dict[str, object], says: str
) -> None:
    good = {
        "values": torch.zeros(32, 2, dtype=torch.int8),
        "scale": torch.ones(2, 2),
        "type": "int4",
    }
    QuantisedWeight(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says):
        QuantisedWeight(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["int4", "int8:", "int8:8", "int8:24", "int8:0", "INT8"])
def test_other_forms_are_refused(form: str) -> None:
    with pytest.raises(RecipeError, match="multiple of 16"):
        check_form(form)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(RecipeError, match="its 96 channels are no multiple of 64"):
        quantised({"W": torch.ones(96, 2)}, "int8:64", name="layer")
    given = {"W": torch.ones(96, 2)}
    assert quantised(given, "float", name="layer") is given


def test_the_recipe_takes_the_forms_alone() -> None:
    assert ModelSection(id="x", weights="int8:128").weights == "int8:128"
    with pytest.raises(ValidationError, match="weights"):
        ModelSection(id="x", weights="int4")


@pytest.mark.parametrize("form", ["int8", "int8:32"])
def test_export_with_int8_weights_is_torchs(
    tiny_llama: Path, traced_llama: TracedModel, tmp_path: Path, form: str
) -> None:
    """Fused, selected in an order of their own, in a quarter of the bytes; native and body."""
    model = load(tiny_llama)
    behaviour = Behaviour(pattern=PATTERN)
    order = torch.arange(64, dtype=torch.int32).reshape(4, 16).t().reshape(-1)
    tensors = {
        name: quantised(
            fold(
                linear,
                behaviour,
                Constants(channel_order=order if linear.in_features == 64 else None),
                dtype=torch.float32,
            ),
            form,
            name=name,
        )
        for name, linear in linears_of(model).items()
    }
    specs = specs_of(model, behaviour)
    write_models(traced_llama, specs, tensors.__getitem__, tmp_path)
    checks.check_sparse(tmp_path / "model.onnx", {spec.name: spec for spec in specs})
    exported = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    weights = {item.name: item for item in exported.graph.initializer}
    fused = weights["model.layers.0.mlp.gate_proj+up_proj.W"]
    assert (fused.data_type, list(fused.dims)) == (onnx.TensorProto.INT8, [64, 256])
    stand_ins = {name: SparseLinear(behaviour, one) for name, one in tensors.items()}
    replace_linears(model, stand_ins)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (1, 12))
    mask = np.ones_like(ids)
    expected = torch_logits(model, ids, mask)
    for library in {None, native.find_library()}:
        actual = onnx_logits(tmp_path / "model.onnx", ids, mask, prefill=8, library=library)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
