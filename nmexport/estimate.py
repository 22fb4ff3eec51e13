"""What a build will take, before it runs: file sizes known, the rest from the model's size.

Estimates, said as such: a dense copy of the weights is counted once for each place that holds
one. Sizes come from safetensors headers or from the weight files; no tensor is read.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nmexport.models.source import ModelSource
    from nmexport.pipeline import Step
    from nmexport.recipe import Recipe

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WORKING_BYTES = 4  # calibration and verification compute in float32
_GGUF_BITS = 5  # a 4-bit GGUF keeps scales and some tensors wider
_SMALL = 2_000_000  # statistics, reports, tokenizer files
# Copies of the weights that are in memory at once: calibration holds the model; folding holds
# the model and one folded shard; export a few matrices, and of a .gguf the model; verification
# the torch model and both sessions.
_COPIES = {
    "calibrate": 1.3,
    "fold": 2.0,
    "export": 0.2,
    "engine": 1.0,
    "verify": 3.5,
    "package": 1.0,
}
# Copies of the weights that a stage writes: the folded linears; the sparse and dense ONNX; what is
# served.
_WRITTEN = {"fold": 1.0, "export": 2.0, "package": 1.0}
# A TensorRT engine: the parser's copy, the network's and the plan's; two plans are written.
_TENSORRT_COPIES, _TENSORRT_PLANS = 3.0, 2.0
_RUNTIME_BYTES = 700_000_000  # the interpreter with its libraries loaded


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that a build writes and holds."""

    parameters: int
    bytes_by_stage: dict[str, int]
    """Size of each stage's artifact: measured where it is there, estimated where not."""
    write_bytes: int
    memory_bytes: int
    free_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(vars(self))


def estimate(recipe: Recipe, source: ModelSource, steps: Sequence[Step], work: Path) -> Estimate:
    """What the steps that run will write to disk and hold in memory."""
    parameters = parameter_count(source)
    element = _ELEMENT_BYTES[recipe.model.dtype]
    written = dict(_WRITTEN)
    if not recipe.model.dense_baseline:
        written["export"] -= 1.0
    copies_of = dict(_COPIES)
    if source.gguf_file is not None:
        copies_of["export"] += 1.0
    if recipe.target in {"tensorrt", "tensorrt-rtx"}:
        written["engine"] = _TENSORRT_PLANS
        copies_of["engine"] = _TENSORRT_COPIES
    sizes = {
        step.stage: step.bytes
        if step.bytes is not None
        else int(written.get(step.stage, 0) * parameters * element) + _SMALL
        for step in steps
    }
    runs = [step.stage for step in steps if step.action != "cached"]
    copies = max((copies_of.get(stage, 0.0) for stage in runs), default=0.0)
    holds = int(copies * parameters * _WORKING_BYTES)
    nearest = next(path for path in (work.absolute(), *work.absolute().parents) if path.exists())
    return Estimate(
        parameters=parameters,
        bytes_by_stage=sizes,
        write_bytes=sum(sizes[stage] for stage in runs),
        memory_bytes=holds + _RUNTIME_BYTES if runs else 0,
        free_bytes=shutil.disk_usage(nearest).free,
    )


def parameter_count(source: ModelSource) -> int:
    """Elements of a model's weights: exact for safetensors, from the file size for a GGUF."""
    if source.gguf_file is not None:
        return (source.folder / source.gguf_file).stat().st_size * 8 // _GGUF_BITS
    files = sorted(source.folder.glob("*.safetensors"))
    return sum(_elements(path) for path in files)


def _elements(path: Path) -> int:
    """Elements that a safetensors file's header counts; 0 for a file with no readable header."""
    prefix = 8  # the header's length, little-endian
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(prefix), "little")
            if length > path.stat().st_size:
                return 0
            header = json.loads(stream.read(length))
        return sum(math.prod(row["shape"]) for name, row in header.items() if "shape" in row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0  # the loader will say what is wrong with it
