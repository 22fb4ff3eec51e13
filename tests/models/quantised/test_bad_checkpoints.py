"""Quantised checkpoints that are broken or of a kind that is not read: one clear sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.errors import ModelError
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.recipe import ModelSection
from safetensors.torch import load_file, save_file

from tests.support.quantised_checkpoints import WHOLE, save_awq, save_gptq

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture
def awq(tiny_llama: Path, tmp_path: Path) -> Path:
    save_awq(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gptq(tiny_llama: Path, tmp_path: Path) -> Path:
    save_gptq(tiny_llama, tmp_path / "model", act_order=True)
    return tmp_path / "model"


def refused(folder: Path) -> str:
    """What is said of a checkpoint, and by which loader it must have been said."""
    with pytest.raises(ModelError) as caught:
        load_model(resolve(ModelSection(id=str(folder))))
    return caught.value.problem


def change(folder: Path, role: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace a tensor of one linear, or remove it."""
    tensors = load_file(folder / WHOLE)
    made = make(tensors.pop(f"{MODULE}.{role}"))
    if made is not None:
        tensors[f"{MODULE}.{role}"] = made.contiguous()
    save_file(tensors, folder / WHOLE)


def configure(folder: Path, **values: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("role", ["qzeros", "scales"])
def test_a_tensor_is_missing(role: str, awq: Path) -> None:
    change(awq, role, lambda _: None)
    assert f"{MODULE} of {awq} is stored without its {role}" in refused(awq)


def test_the_values_are_missing(awq: Path) -> None:
    change(awq, "qweight", lambda _: None)
    assert f"{MODULE}.qzeros is stored as I32" in refused(awq)


def test_the_file_is_truncated(awq: Path) -> None:
    path = awq / WHOLE
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged or incomplete" in refused(awq)


@pytest.mark.parametrize("size", [64, 128, -1])
def test_another_group_size_than_the_scales_have(size: int, awq: Path) -> None:
    configure(awq, group_size=size)
    told = refused(awq)
    assert "its scales are for groups of 32 channels" in told
    assert f"the configuration says group size {size}" in told


@pytest.mark.parametrize(
    ("role", "told"),
    [
        ("qweight", "qweight is [64, 15] for 128 outputs, which is not 4 bits"),
        ("qzeros", "qzeros is [2, 15], not [2, 16]"),
        ("scales", "for 127 outputs, which is not 4 bits"),
    ],
)
def test_shapes_that_do_not_fit(role: str, told: str, awq: Path) -> None:
    change(awq, role, lambda tensor: tensor[:, :-1])
    assert told in refused(awq)


def test_a_vector_in_place_of_a_matrix(awq: Path) -> None:
    change(awq, "scales", lambda tensor: tensor.flatten())
    assert "scales is [256], not a matrix" in refused(awq)


def test_groups_that_do_not_divide_the_channels(awq: Path) -> None:
    configure(awq, group_size=None)
    for role in ("scales", "qzeros"):
        change(awq, role, lambda tensor: torch.cat([tensor, tensor[:1]]))
    assert "its 64 channels do not divide into 3 scale groups" in refused(awq)


def test_other_bits_than_the_values_have(gptq: Path) -> None:
    configure(gptq, bits=8)
    assert "do not fit together" in refused(gptq)


def test_an_act_order_whose_groups_differ_in_size(gptq: Path) -> None:
    change(gptq, "g_idx", lambda order: torch.where(order == order[0], 1 - order[0], order))
    told = refused(gptq)
    assert f"activation order (g_idx) of {MODULE} does not fit its scales" in told
    assert "2 groups of 32 channels" in told


@pytest.mark.parametrize("value", [2, -1])
def test_an_act_order_that_names_no_group(value: int, gptq: Path) -> None:
    def spoil(order: torch.Tensor) -> torch.Tensor:
        order[3] = value
        return order

    change(gptq, "g_idx", spoil)
    assert "does not fit its scales" in refused(gptq)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"version": "gemv"}, "AWQ, 4 bits, in AWQ's layout 'gemv'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "in GPTQ's layout 'marlin'"),
        ({"quant_method": "quip"}, "quip"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "names no scheme"),
    ],
)
def test_a_layout_that_is_not_read(values: dict[str, Any], told: str, awq: Path) -> None:
    configure(awq, **values)
    problem = refused(awq)
    assert told in problem
    assert problem.endswith("which is not read.")


def test_scales_that_are_not_finite(awq: Path) -> None:
    change(awq, "scales", lambda scales: scales * float("inf"))
    assert "holds NaN or infinite values" in refused(awq)


def test_a_bias_of_zeros_that_the_model_does_not_have(awq: Path) -> None:
    """Older GPTQ libraries give every linear one."""
    tensors = load_file(awq / WHOLE)
    save_file({**tensors, f"{MODULE}.bias": torch.zeros(128)}, awq / WHOLE)
    load_model(resolve(ModelSection(id=str(awq))))
    save_file({**tensors, f"{MODULE}.bias": torch.ones(128)}, awq / WHOLE)
    assert f"{MODULE}.bias, which" in refused(awq)


def test_scales_of_activations_are_left_out(awq: Path) -> None:
    tensors = load_file(awq / WHOLE)
    more = {
        f"{MODULE}.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    save_file({**tensors, **more}, awq / WHOLE)
    load_model(resolve(ModelSection(id=str(awq))))


def test_the_configuration_stands_in_a_file_of_its_own(awq: Path) -> None:
    """As AutoAWQ wrote it before transformers took it up."""
    document = json.loads((awq / "config.json").read_text())
    section = document.pop("quantization_config")
    (awq / "config.json").write_text(json.dumps(document))
    assert "GPTQ or AWQ, as it seems" in refused(awq)
    old = {"w_bit": 4, "q_group_size": section["group_size"], "version": "GEMM"}
    (awq / "quant_config.json").write_text(json.dumps(old))
    load_model(resolve(ModelSection(id=str(awq))))
