"""Estimates what a build will take before it runs, from file sizes and the model's size.

Estimates, said as such: a dense copy of the weights is counted once for each place that holds
one; where the model runs layer by layer, a layer of it; where it is read into a GPU, what the host
keeps beside mapped files; activations by what a small model took.
Sizes come from safetensors headers or from the weight files; no tensor is read.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.calibration.text_sources import SELF
from nmexport.models.gguf_files import UNPACKED_BYTES, is_unpacked, unpacked_folder
from nmexport.models.offload import free_memory, placement
from nmexport.pipeline import READ_WEIGHTS
from nmexport.runtimes import native
from nmexport.sparsity.mitigation import learned_parts
from nmexport.store.tensors import SHARD_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from nmexport.models.offload import Placement
    from nmexport.models.source import ModelSource
    from nmexport.recipe import Recipe
    from nmexport.selection import Step

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SESSIONS = 2
_WORKING_BYTES = 4  # calibration and verification compute in float32
_GGUF_BITS = 5  # a 4-bit GGUF keeps scales and some tensors wider
_SMALL = 2_000_000  # statistics, reports, tokenizer files
# Copies of the weights in float32 that are in memory at once: calibration holds the model; folding
# the model and one folded shard; export a few matrices, and of a .gguf the model; verification the
# torch model, and both sessions in the type that they are stored in.
_COPIES = {
    "calibrate": 1.3,
    "fold": 1.1,
    "export": 0.2,
    "engine": 1.0,
    "verify": 1.0,
    "package": 1.0,
}
# Copies of the weights that a stage writes: the folded linears; the sparse and dense ONNX; what is
# served.
_WRITTEN = {"fold": 1.0, "export": 2.0, "package": 1.0}
# A TensorRT engine: the parser's copy, the network's and the plan's; two plans are written.
_TENSORRT_COPIES, _TENSORRT_PLANS = 3.0, 2.0
# Memory other than the weights, where a model is not run layer by layer, measured on 135 million
# parameters (SmolLM2). Activations grow with width and depth, so about as the root of the
# parameters; logits, which verification holds, only with the vocabulary: a 7B model took 45 GB in
# fold, 61 in verify.
_MEASURED_PARAMETERS = 135_000_000
_WRITING_BYTES = 2_100_000_000  # the cache of samples that the model writes, at most as much
_LEARNING_BYTES = 2_500_000_000  # activations of a step of learning, kept for its gradient
_COMPARING_BYTES = 2_400_000_000  # logits of both sides, and inputs of linears that are audited
RUNTIME_BYTES = 700_000_000  # the interpreter with its libraries loaded
_LEARNING_LAYERS = 2.5  # layer by layer: sizes of one, with its weights rounded and activations
_FOLD_COPIES = 6.0  # layer by layer: copies of a linear while it is folded, in float64
# On a GPU the host keeps no weights: CUDA's and the runtimes' own memory, text and its logits, one
# shard of what is folded, and what is learned with its optimiser's state, a share of the weights.
_DEVICE_RUNTIME_BYTES = 3_000_000_000
_DEVICE_WRITING_BYTES = 1_000_000_000
_LEARNED_SHARE = 0.05
_TENSORS = 4.0  # copies of the largest tensor while it is turned, converted and written
_LAYER = re.compile(r"(.*\.\d+)\.")
_MATRIX = 2  # dimensions


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that a build writes and holds."""

    parameters: int
    bytes_by_stage: dict[str, int]
    """Size of each stage's artifact: measured where it is there, estimated where not."""
    unpacked_bytes: int
    """What a `.gguf` takes once more as safetensors, see `nmexport.models.unpacked`; 0 where that
    is there already, or no stage reads weights."""
    write_bytes: int
    memory_bytes: int
    """Peak memory of the largest stage."""
    memory_by_stage: dict[str, int]
    """Peak memory of each stage that runs."""
    free_bytes: int

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return dict(vars(self))


def estimate(recipe: Recipe, source: ModelSource, steps: Sequence[Step], work: Path) -> Estimate:
    """Estimate what the steps that run will write to disk and hold in memory."""
    parameters = parameter_count(source)
    element = _ELEMENT_BYTES[recipe.model.dtype]
    written = dict(_WRITTEN)
    if not recipe.model.dense_baseline:
        written["export"] -= 1.0
    if recipe.target in {"tensorrt", "tensorrt-rtx"}:
        written["engine"] = _TENSORRT_PLANS
    sizes = {
        step.stage: step.bytes
        if step.bytes is not None
        else int(written.get(step.stage, 0) * parameters * element) + _SMALL
        for step in steps
    }
    runs = [step.stage for step in steps if step.action != "cached"]
    unpacked = _unpacked_bytes(source, work, parameters) if READ_WEIGHTS.intersection(runs) else 0
    holds = _memory(recipe, source, parameters)
    held = {stage: holds.get(stage, 0) + RUNTIME_BYTES for stage in runs}
    nearest = next(path for path in (work.absolute(), *work.absolute().parents) if path.exists())
    return Estimate(
        parameters=parameters,
        bytes_by_stage=sizes,
        unpacked_bytes=unpacked,
        write_bytes=sum(sizes[stage] for stage in runs) + unpacked,
        memory_bytes=max(held.values(), default=0),
        memory_by_stage=held,
        free_bytes=shutil.disk_usage(nearest).free,
    )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, in elements."""

    parameters: int
    layer: int
    """The largest decoder layer, or embedding."""
    matrix: int
    """The largest linear of a layer."""
    tensor: int
    """The largest tensor, embeddings among them."""


def shape_of(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Shape:
    """Compute a model's sizes from the names and shapes of its tensors."""
    parts: dict[str, int] = {}
    matrix = tensor = 0
    for name, shape in tensors:
        match, size = _LAYER.match(name), math.prod(shape)
        part = match[1] if match else name
        parts[part] = parts.get(part, 0) + size
        tensor = max(tensor, size)
        if match and len(shape) == _MATRIX:
            matrix = max(matrix, size)
    return Shape(
        parameters=sum(parts.values()),
        layer=max(parts.values(), default=0),
        matrix=matrix,
        tensor=tensor,
    )


def _unpacked_bytes(source: ModelSource, work: Path, parameters: int) -> int:
    if not source.packed or is_unpacked(unpacked_folder(work, source.digest)):
        return 0
    return UNPACKED_BYTES * parameters


def _memory(recipe: Recipe, source: ModelSource, parameters: int) -> dict[str, int]:
    """Estimate the bytes that each stage holds of the weights, and besides."""
    if source.gguf_file is None:
        shape = shape_of(_shapes(source))
    else:
        shape = Shape(parameters=parameters, layer=0, matrix=0, tensor=0)
    return memory_by_stage(
        recipe,
        shape,
        is_packed=source.gguf_file is not None,
        place=_place(recipe, source),
        on_gpu=_runs_on_gpu(),
    )


def memory_by_stage(
    recipe: Recipe,
    shape: Shape,
    *,
    is_packed: bool = False,
    place: Placement = "whole",
    on_gpu: bool = False,
) -> dict[str, int]:
    """Bytes of the host that each stage holds beside the interpreter, and beside mapped files.

    Args:
        recipe: What is built.
        shape: The model's.
        is_packed: Its weights lie in a `.gguf`.
        place: Where calibration runs the model.
        on_gpu: ONNX Runtime computes on a GPU.
    """
    copies = dict(_COPIES)
    if is_packed:
        copies["export"] += 1.0
    if recipe.target in {"tensorrt", "tensorrt-rtx"}:
        copies["engine"] = _TENSORRT_COPIES
    held = {stage: int(each * shape.parameters * _WORKING_BYTES) for stage, each in copies.items()}
    held["verify"] += _SESSIONS * shape.parameters * _ELEMENT_BYTES[recipe.model.dtype]
    extra = _extra_memory(recipe, shape.parameters)
    held = {stage: count + extra.get(stage, 0) for stage, count in held.items()}
    if place == "layerwise":
        held |= _layerwise_memory(recipe, shape)
    elif place == "device":
        held |= _device_memory(recipe, shape)
    if on_gpu and place == "device":
        held |= _gpu_memory(shape)
    return held


def _extra_memory(recipe: Recipe, parameters: int) -> dict[str, int]:
    """Estimate the bytes that stages hold of activations, caches and logits."""
    growth = math.sqrt(parameters / _MEASURED_PARAMETERS)
    section = recipe.calibration
    writes = section.corpus == SELF or section.self_share > 0
    learns = bool(learned_parts(recipe.sparsity.mitigations))
    # Under a budget fold holds the model once more in each form of integers, to try it.
    rounded = len(recipe.forms.integers) if recipe.allocation.budget.limits() else 0
    return {
        "calibrate": int(writes * min(growth, 1.0) * _WRITING_BYTES),
        "fold": int(learns * growth * _LEARNING_BYTES) + rounded * _WORKING_BYTES * parameters,
        "verify": int(math.sqrt(growth) * _COMPARING_BYTES),
    }


def _device_memory(recipe: Recipe, shape: Shape) -> dict[str, int]:
    """Estimate host bytes of calibrate and fold, where a GPU holds the model."""
    learns = bool(learned_parts(recipe.sparsity.mitigations))
    learned = int(learns * _LEARNED_SHARE * _WORKING_BYTES * shape.parameters)
    writing = _DEVICE_RUNTIME_BYTES + _DEVICE_WRITING_BYTES
    return {
        "calibrate": writing,
        "fold": max(writing, _DEVICE_RUNTIME_BYTES + SHARD_BYTES + learned),
    }


def _gpu_memory(shape: Shape) -> dict[str, int]:
    """Estimate host bytes of the other stages, where a GPU runs the exported files."""
    tensor = int(_TENSORS * _WORKING_BYTES * shape.tensor)
    return {
        "export": _DEVICE_RUNTIME_BYTES + tensor,
        "engine": _DEVICE_RUNTIME_BYTES,
        "verify": _DEVICE_RUNTIME_BYTES + _COMPARING_BYTES + tensor,
        "package": _DEVICE_RUNTIME_BYTES,
    }


def _place(recipe: Recipe, source: ModelSource) -> Placement:
    offload = recipe.calibration.offload
    if source.gguf_file is not None:
        return "whole"
    return placement(source, offload, parameter_count(source), free_memory())


def _runs_on_gpu() -> bool:
    """Tell whether ONNX Runtime computes on a GPU here."""
    if not free_memory().devices:
        return False
    from nmexport.runtimes.onnxruntime_opening import choose_provider

    return choose_provider(native.find_library()) == "cuda"


def _layerwise_memory(recipe: Recipe, shape: Shape) -> dict[str, int]:
    """Estimate the bytes of calibrate and fold with one decoder layer in memory at a time."""
    layer = _WORKING_BYTES * shape.layer
    learning = _LEARNING_LAYERS * layer if learned_parts(recipe.sparsity.mitigations) else layer
    writing = SHARD_BYTES + int(_FOLD_COPIES * _WORKING_BYTES * shape.matrix)
    return {"calibrate": layer, "fold": max(int(learning), writing)}


def parameter_count(source: ModelSource) -> int:
    """Count a model's weights: exactly for safetensors, by file size for a GGUF."""
    if source.gguf_file is not None:
        return sum(path.stat().st_size for path in source.gguf_files) * 8 // _GGUF_BITS
    return sum(math.prod(shape) for _, shape in _shapes(source))


def _shapes(source: ModelSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Read the tensors of safetensors files by their headers; skip files that cannot be read."""
    for path in sorted(source.folder.glob("*.safetensors")):
        yield from _header(path)


def _header(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    prefix = 8  # the header's length, little-endian
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(prefix), "little")
            if length > path.stat().st_size:
                return []
            header = json.loads(stream.read(length))
        return [(name, tuple(row["shape"])) for name, row in header.items() if "shape" in row]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # the loader will say what is wrong with it
