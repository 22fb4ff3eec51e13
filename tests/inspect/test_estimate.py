"""What could hurt: a plan that promises to fit and does not, or fails on a strange weight file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.inspect.estimate import estimate, parameter_count
from nmexport.models.gguf_files import UNPACKED_COMPLETE, unpacked_folder
from nmexport.models.offload import Memory
from nmexport.models.source import ModelSource
from nmexport.recipe import resolve
from nmexport.selection import Step
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

MILLION = 1_000_000


def source(folder: Path, gguf: str | None = None) -> ModelSource:
    return ModelSource(id="x", revision=None, folder=folder, gguf_file=gguf, digest="d")


def step(stage: str, action: str = "run", size: int | None = None) -> Step:
    return Step(stage=stage, key="k" * 64, action=action, reason="", bytes=size)  # type: ignore[arg-type]


def test_parameters_are_counted_from_headers_alone(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 4), np.float32)}, tmp_path / "1.safetensors")
    save_file(
        {"b": np.zeros(5, np.float16), "c": np.zeros((), np.int8)}, tmp_path / "2.safetensors"
    )
    assert parameter_count(source(tmp_path)) == 18


@pytest.mark.parametrize("contents", [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"{}"])
def test_strange_weight_files_count_nothing(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "1.safetensors").write_bytes(contents)
    assert parameter_count(source(tmp_path)) == 0


def test_bytes_follow_parameters_element_type_and_what_runs(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"\0" * (5 * MILLION // 8))
    model = source(tmp_path, "m.gguf")
    steps = [step("calibrate", "cached", 7), step("fold"), step("export")]
    wide = estimate(resolve("a/b"), model, steps, tmp_path / "not" / "yet")
    assert wide.parameters == MILLION
    assert wide.bytes_by_stage["calibrate"] == 7
    assert wide.bytes_by_stage["export"] - wide.bytes_by_stage["fold"] == 4 * MILLION
    assert wide.unpacked_bytes == 5 * MILLION
    written = wide.bytes_by_stage["fold"] + wide.bytes_by_stage["export"]
    assert wide.write_bytes == written + wide.unpacked_bytes
    narrow = estimate(resolve("a/b", {"model.dtype": "bfloat16"}), model, steps, tmp_path)
    assert wide.write_bytes - narrow.write_bytes == 6 * MILLION
    assert wide.memory_bytes >= 14 * MILLION
    assert wide.free_bytes > 0


def test_a_gguf_is_dequantised_once_where_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"\0" * (5 * MILLION // 8))
    model, recipe = source(tmp_path, "m.gguf"), resolve("a/b")
    assert estimate(recipe, model, [step("package")], tmp_path).unpacked_bytes == 0
    assert estimate(recipe, model, [step("fold", "cached", 7)], tmp_path).unpacked_bytes == 0
    assert estimate(recipe, model, [step("fold")], tmp_path).unpacked_bytes == 5 * MILLION
    folder = unpacked_folder(tmp_path, model.digest)
    folder.mkdir(parents=True)
    (folder / UNPACKED_COMPLETE).touch()
    assert estimate(recipe, model, [step("fold")], tmp_path).unpacked_bytes == 0


def test_the_parts_of_a_split_gguf_count_together(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"\0" * (5 * MILLION // 8))
    parts = replace(source(tmp_path, "a.gguf"), more_parts=("b.gguf",))
    assert parameter_count(parts) == 2 * MILLION


def test_a_tensorrt_engine_writes_two_plans(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"\0" * (5 * MILLION // 8))
    model, steps = source(tmp_path, "m.gguf"), [step("engine")]
    plain = estimate(resolve("a/b"), model, steps, tmp_path)
    plans = estimate(resolve("a/b", {"target": "tensorrt-rtx"}), model, steps, tmp_path)
    assert plans.write_bytes - plain.write_bytes == 8 * MILLION
    assert plans.memory_bytes > plain.memory_bytes


def test_learning_and_writing_take_memory_beside_the_weights(tmp_path: Path) -> None:
    """Measured on SmolLM2: 3.5 GB in calibrate, 4.2 in fold, 5.0 in verify."""
    with (tmp_path / "m.gguf").open("wb") as stream:
        stream.truncate(135 * MILLION * 5 // 8)
    model = source(tmp_path, "m.gguf")
    steps = [step("calibrate"), step("fold"), step("verify")]

    def held(**changes: object) -> dict[str, int]:
        overrides = {name.replace("__", "."): value for name, value in changes.items()}
        recipe = resolve("a/b", {"calibration.offload": "never", **overrides})
        return estimate(recipe, model, steps, tmp_path).memory_by_stage

    whole = held()
    measured = {"calibrate": 3.5e9, "fold": 4.2e9, "verify": 5.0e9}
    assert whole == pytest.approx(measured, rel=0.1)
    given = held(calibration__corpus="text.txt", calibration__self_share=0.0)
    assert given["calibrate"] < 0.5 * whole["calibrate"]
    unlearned = held(sparsity__mitigations=["var"])
    assert unlearned["fold"] < 0.5 * whole["fold"]
    budget = {"sparsity__mitigations": ["var"], "allocation__budget": {"max_bytes": 0.2}}
    tried = held(allocation__weights=["float", "int8", "int4"], **budget)
    assert tried["fold"] - unlearned["fold"] == 2 * 4 * 135 * MILLION


def test_nothing_to_run_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    idle = estimate(
        resolve("a/b"), source(tmp_path, "m.gguf"), [step("fold", "cached", 9)], tmp_path
    )
    assert (idle.write_bytes, idle.memory_bytes) == (0, 0)


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of which only the header is there: more is not to be read."""
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    text = json.dumps({"__metadata__": {}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.fixture
def mistral(tmp_path: Path) -> ModelSource:
    """Its shapes, in two files."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, 4096),
        "lm_head.weight": (32000, 4096),
    }
    for index in range(32):
        for name, size in (("q_proj", 4096), ("k_proj", 1024), ("v_proj", 1024), ("o_proj", 4096)):
            shapes[f"model.layers.{index}.self_attn.{name}.weight"] = (size, 4096)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{index}.mlp.{name}.weight"] = (14336, 4096)
        shapes[f"model.layers.{index}.mlp.down_proj.weight"] = (4096, 14336)
        shapes[f"model.layers.{index}.input_layernorm.weight"] = (4096,)
    names = list(shapes)
    for file, part in (("1", names[:99]), ("2", names[99:])):
        write_header(tmp_path / f"{file}.safetensors", {name: shapes[name] for name in part})
    return source(tmp_path)


def memory_of(model: ModelSource, offload: str) -> dict[str, int]:
    steps = [step("calibrate"), step("fold"), step("export")]
    recipe = resolve("a/b", {"calibration.offload": offload})
    return estimate(recipe, model, steps, model.folder).memory_by_stage


def test_layer_by_layer_holds_a_layer(
    mistral: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, layered = memory_of(mistral, "never"), memory_of(mistral, "layerwise")
    assert parameter_count(mistral) == pytest.approx(7.24e9, rel=0.01)
    assert whole["calibrate"] > 4 * 7.2e9
    layer = 4 * 218_000_000
    assert layer < layered["calibrate"] < 2 * layer
    # A layer that learns holds its weights once more, rounded, and activations beside them.
    assert 2 * layer < layered["fold"] < 4.5e9
    assert layered["export"] == whole["export"]

    for host, expected in ((20 << 30, layered), (80 << 30, whole)):
        memory = Memory(host=host)
        monkeypatch.setattr("nmexport.inspect.estimate.free_memory", lambda memory=memory: memory)
        assert memory_of(mistral, "auto") == expected


def test_a_gpu_takes_the_weights_off_the_host(
    mistral: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar is 24 GB beside mapped files, in every stage."""
    monkeypatch.setattr(
        "nmexport.inspect.estimate.free_memory",
        lambda: Memory(host=120 << 30, devices=(139 << 30,)),
    )
    monkeypatch.setattr("nmexport.inspect.estimate._runs_on_gpu", lambda: True)
    names = ("calibrate", "fold", "export", "engine", "verify", "package")
    recipe = resolve("a/b", {"model.dtype": "bfloat16"})
    expected = estimate(recipe, mistral, [step(name) for name in names], mistral.folder)
    assert min(expected.memory_by_stage.values()) > 3e9
    # Measured on one: 6.9 GB. A layer's tensors are held one at a time, not together.
    assert 6.9e9 < expected.memory_bytes < 1.25 * 6.9e9
    monkeypatch.setattr("nmexport.inspect.estimate._runs_on_gpu", lambda: False)
    without = estimate(recipe, mistral, [step(name) for name in names], mistral.folder)
    assert without.memory_by_stage["fold"] == expected.memory_by_stage["fold"]
    assert without.memory_by_stage["verify"] > 40e9
