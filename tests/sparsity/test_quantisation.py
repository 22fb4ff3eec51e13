"""Stored weights: what they stand for, their forms, and that they travel through export."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import pytest
import torch
from nmexport.errors import RecipeError
from nmexport.models.swap import replace_linears
from nmexport.recipe import ModelSection
from nmexport.runtimes import native
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.quantisation import QuantisedWeight, rounded_rows
from nmexport.sparsity.rounding import quantised
from nmexport.sparsity.weight_form import StoredType, WeightForm
from nmexport.stages.exporting import write_models
from pydantic import ValidationError

from tests.support.exported import PATTERN, linears_of, load, onnx_logits, specs_of, torch_logits
from tests.support.tiny import VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.stages.exporting import TracedModel


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


@pytest.mark.parametrize("form", ["int3", "int8:", "int8:8", "int4:24", "int8:0", "INT8", "4"])
def test_other_forms_are_refused(form: str) -> None:
    with pytest.raises(RecipeError, match="weights cannot be") as refusal:
        WeightForm.parse(form)
    assert "int4:CHANNELS" in str(refusal.value.allowed)
    with pytest.raises(ValidationError, match="weights"):
        ModelSection(id="x", weights=form)


@pytest.mark.parametrize(
    ("text", "groups"), [("int8", 1), ("int8:64", 3), ("int4", 6), ("int4:96", 2)]
)
def test_a_form_says_how_many_scales_an_output_has(text: str, groups: int) -> None:
    form = WeightForm.parse(ModelSection(id="x", weights=text).weights)
    assert form is not None
    assert form.groups(192, name="layer") == groups
    assert WeightForm.parse(str(form)) == form
    assert WeightForm.parse("float") is None


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    form = WeightForm.parse("int8:64")
    assert form is not None
    with pytest.raises(RecipeError, match="layer: its 96 channels are no multiple of 64"):
        form.groups(96, name="layer")


@pytest.mark.parametrize(("width", "groups"), [(32, 1), (96, 3), (40, 1)])
def test_rows_of_an_embedding_are_rounded_one_by_one(width: int, groups: int) -> None:
    table = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    table[3] = 0.0
    table[4] *= 1e4
    table[5, 0] = 1e4
    values, scale = rounded_rows(table)
    assert (values.dtype, scale.shape) == (torch.int8, (9, groups))
    step = scale.repeat_interleave(width // groups, dim=1)
    assert bool(((values * step - table).abs() <= step * 0.50001).all())
    assert bool((values[3] == 0).all())
    assert bool((values.abs().reshape(9, groups, -1).amax(dim=2)[[0, 4]] == 127).all())


def stored(
    linear: torch.nn.Linear, type_: StoredType, group: int | None, order: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The op's inputs of one folded linear, its weight in integers."""
    made = fold(
        linear,
        Behaviour(pattern=PATTERN),
        Constants(channel_order=order if linear.in_features == 64 else None),
        dtype=torch.float32,
    )
    weight = quantised(made["W"], WeightForm(type_, group), name="layer")
    made |= {"W": weight.values, "weight_scale": weight.scale}
    return made if weight.zero_point is None else made | {"weight_zero_point": weight.zero_point}


@pytest.mark.parametrize("activation_bits", [0, 8])
@pytest.mark.parametrize(
    ("type_", "group"), [("int8", None), ("int8", 32), ("int4", 32), ("uint4", 16)]
)
def test_export_of_stored_weights_is_torchs(  # noqa: PLR0917
    tiny_llama: Path,
    traced_llama: TracedModel,
    tmp_path: Path,
    type_: StoredType,
    group: int | None,
    activation_bits: Literal[0, 8],
) -> None:
    """Fused, selected in an order of their own, in fewer bytes; with the body alone."""
    model = load(tiny_llama)
    block = 16 if group == 16 else 32
    behaviour = Behaviour(pattern=PATTERN, activation_bits=activation_bits, activation_block=block)
    order = torch.arange(64, dtype=torch.int32).reshape(4, 16).t().reshape(-1)
    tensors = {
        name: stored(linear, type_, group, order) for name, linear in linears_of(model).items()
    }
    specs = [
        replace(
            spec,
            weight_type=type_,
            activation_bits=activation_bits,
            activation_block=block,
        )
        for spec in specs_of(model, behaviour)
    ]
    write_models(traced_llama, specs, tensors.__getitem__, tmp_path)
    exported = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    weights = {item.name: item for item in exported.graph.initializer}
    fused = weights["model.layers.0.mlp.gate_proj+up_proj.W"]
    assert fused.data_type == getattr(onnx.TensorProto, type_.upper())
    assert list(fused.dims) == [64, 256]
    length = next(int(e.value) for e in fused.external_data if e.key == "length")
    assert length == 64 * 256 * (8 if type_ == "int8" else 4) // 8
    stand_ins = {name: SparseLinear(behaviour, one) for name, one in tensors.items()}
    replace_linears(model, stand_ins)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (1, 12))
    mask = np.ones_like(ids)
    expected = torch_logits(model, ids, mask)
    whole = type_ == "int8" and not activation_bits
    for library in {None, native.find_library()} if whole else {None}:
        actual = onnx_logits(tmp_path / "model.onnx", ids, mask, prefill=8, library=library)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
