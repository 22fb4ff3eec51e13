"""The dense ONNX file is held against dense torch before anything sparse is measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from nmexport.errors import ModelError
from nmexport.models.source import resolve
from nmexport.progress import Silent
from nmexport.recipe import ModelSection
from nmexport.report.model import DenseParity, Parity, ParityLeg
from nmexport.stages import export
from nmexport.verification import parity
from nmexport.verification.dense_check import TOLERANCE, TorchModel, check
from onnx import numpy_helper

from tests.support.exported import export_folder

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.exported import Exported


def torch_model(folder: Path, scratch: Path, **options: Any) -> TorchModel:
    return TorchModel(
        source=resolve(ModelSection(id=str(folder))),
        **{
            "dtype": "float32",
            "offload": "never",
            "folder": scratch,
            **options,
        },
    )


@pytest.mark.parametrize("offload", ["never", "layerwise"])
def test_a_faithful_file(
    offload: str, plain_export: Exported, tiny_llama: Path, tmp_path: Path
) -> None:
    result = check(
        plain_export.dense_model,
        plain_export.model,
        torch_model(tiny_llama, tmp_path, offload=offload),
        vocabulary=384,
        progress=Silent(),
    )
    assert result.error < TOLERANCE["float32"] / 10
    assert result.outputs == 2 * 7 + 2, "every linear, the logits, the logits of decode"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_stay_well_within(dtype: str, tiny_llama: Path, tmp_path: Path) -> None:
    exported = export_folder(tiny_llama, tmp_path, dtype=dtype)
    model = torch_model(tiny_llama, tmp_path, dtype=dtype)
    result = check(exported.dense_model, exported.model, model, vocabulary=384, progress=Silent())
    assert result.error < TOLERANCE[dtype] / 2


@pytest.mark.parametrize(
    ("wrong", "first"),
    [
        ("model.layers.1.mlp.down_proj.W", "model.layers.1.mlp.down_proj"),
        ("model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj"),
        ("model.norm.weight", "logits"),
    ],
)
def test_the_first_output_that_differs_is_named(
    wrong: str, first: str, plain_export: Exported, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(plain_export.folder, tmp_path / "copy")
    spoiled = dataclasses.replace(plain_export, folder=folder)
    spoil(spoiled.dense_model, wrong)
    for offload in ("never", "layerwise"):
        model = torch_model(tiny_llama, tmp_path, offload=offload)
        with pytest.raises(ModelError, match=f"{first} is the first output that differs"):
            check(spoiled.dense_model, spoiled.model, model, vocabulary=384, progress=Silent())


def spoil(path: Path, name: str) -> None:
    """Exchange halves of one weight of an exported model."""
    model = onnx.load(path)
    tensor = next(value for value in model.graph.initializer if value.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.roll(values, values.size // 2), name))
    path.with_name(f"{path.name}.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def test_an_export_says_what_was_checked(tmp_path: Path) -> None:
    assert "without the check" in export.Artifact(tmp_path).dense_check.why
    (tmp_path / export.DENSE_CHECK).write_text(json.dumps({"error": 1e-6}))
    assert export.Artifact(tmp_path).dense_check == DenseParity(error=1e-6)


LEG = ParityLeg(max_abs=1.0, top1_agreement=0.97)


def report_parity(agreement: float, **values: Any) -> Parity:
    legs = Parity(
        dense=DenseParity(error=1e-6),
        noise_floor=ParityLeg(top1_agreement=1.0),
        torch_onnx=replace(LEG, top1_agreement=agreement),
        torch_engine=LEG,
        onnx_engine=LEG,
    )
    return replace(legs, **values)


def test_disagreement_beyond_rounding_is_told() -> None:
    assert parity.concerns(report_parity(0.95)) == []
    (told,) = parity.concerns(report_parity(0.0))
    assert "torch and onnx choose the same token at 0.0%" in told
    absent = report_parity(0.95, torch_onnx=ParityLeg(why="no room"))
    assert parity.concerns(absent) == []
    unchecked = report_parity(0.95, dense=DenseParity(why="no room"), noise_floor=None)
    assert parity.concerns(unchecked) == [
        "The dense ONNX file was not held against torch: no room."
    ]
