"""Element type of an export that names none: float32, and a checkpoint's 16 bits on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.environment import probe
from nmexport.models.source import resolve as find
from nmexport.recipe import dump, load, resolve
from nmexport.stages import fitting
from nmexport.stages.fitting import stored_type, with_own_type
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path


def saved(tiny_llama: Path, folder: Path, *types: torch.dtype) -> Path:
    """The tiny model with its matrices in the given types by turns."""
    tensors = load_file(tiny_llama / "model.safetensors")
    for place, (name, tensor) in enumerate(sorted(tensors.items())):
        tensors[name] = tensor.to(types[place % len(types)] if tensor.ndim > 1 else torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    return folder


def dtype_of(model: Path, options: dict[str, Any] | None = None) -> str:
    recipe = resolve(str(model), options)
    return with_own_type(recipe, find(recipe.model), probe()).model.dtype


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((torch.bfloat16,), "bfloat16"),
        ((torch.float16,), "float16"),
        ((torch.float32,), "float32"),
        ((torch.bfloat16, torch.float16), "float32"),
    ],
)
def test_on_a_gpu_it_is_the_checkpoints(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    types: tuple[torch.dtype, ...],
    expected: str,
) -> None:
    model = saved(tiny_llama, tmp_path, *types)
    assert dtype_of(model) == "float32"  # no GPU is here
    monkeypatch.setattr(fitting, "gpu_runs", lambda _: True)
    assert dtype_of(model) == expected
    assert dtype_of(model, {"model.dtype": "float32"}) == "float32"


def test_integers_meet_16_bits_on_a_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their kernels take no float32, and a checkpoint of integers has no one type of its own."""
    model = saved(tiny_llama, tmp_path, torch.float32)
    integers = {"model.weights": "int8"}
    assert dtype_of(model, integers) == "float32"
    monkeypatch.setattr(fitting, "gpu_runs", lambda _: True)
    assert dtype_of(model, integers) == "float16"
    assert dtype_of(model, {"model.weights": "float"}) == "float32"
    assert dtype_of(saved(tiny_llama, tmp_path, torch.bfloat16), integers) == "bfloat16"


def test_a_build_keeps_the_type_that_it_was_begun_with(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tiny_llama, tmp_path, torch.bfloat16)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(resolve(str(model))), encoding="utf-8")
    recipe = load(path)
    monkeypatch.setattr(fitting, "gpu_runs", lambda _: True)
    assert with_own_type(recipe, find(recipe.model), probe()).model.dtype == "float32"


def test_files_that_cannot_be_read_say_nothing_of_a_type(tiny_llama: Path, tmp_path: Path) -> None:
    source = find(resolve(str(saved(tiny_llama, tmp_path, torch.bfloat16))).model)
    assert stored_type(source) == "bfloat16"
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert stored_type(source) is None
