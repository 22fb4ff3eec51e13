"""The graphs that `engine` writes for ONNX Runtime beside the exported ones, without weights."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from nmexport.errors import ArtifactError
from nmexport.generation.context import context_length
from nmexport.graph.attention_form import NotRewritableError
from nmexport.graph.cuda import rewrite_for_cuda
from nmexport.graph.matching import int_attribute
from nmexport.graph.shared_step import rewrite_for_shared_step
from nmexport.runtimes.engine import CudaGraphs, StepGraphs
from nmexport.store.exported import DENSE, MODEL, stored_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nmexport.stages.inputs import StageInputs

_CUDA_FOLDER = "cuda"
_STEP_FOLDER = "shared_step"


def check_activations(model: Path) -> None:
    """Refuse a model for a GPU whose linears round what they multiply.

    Raises:
        ArtifactError: if it has such linears.
    """
    if any(int_attribute(node, "activation_bits", 0) for node in ir.load(model).graph):
        raise ArtifactError(
            f"{model} rounds activations to 8 bits, which runs on a CPU alone, and the engine is "
            "for a GPU.",
            fix="build it again with --activations float",
        )


def write_cuda_graphs(inputs: StageInputs) -> tuple[CudaGraphs | None, str | None]:
    """Write the graphs that the CUDA provider runs fastest, or say why there are none."""
    if inputs.recipe.model.dtype == "float32":
        return None, "ONNX Runtime's CUDA attention with a cache in place takes 16-bit types"
    written = _write_graphs(inputs, _CUDA_FOLDER, rewrite_for_cuda)
    if isinstance(written, str):
        return None, written
    return CudaGraphs(**written), None


def write_step_graphs(inputs: StageInputs) -> tuple[StepGraphs | None, str | None]:
    """Write the graphs that a CPU runs steps of many sequences by, or say why there are none."""
    if inputs.recipe.model.dtype != "float32":
        return None, "a step of many sequences computes in float32"
    written = _write_graphs(inputs, _STEP_FOLDER, rewrite_for_shared_step)
    if isinstance(written, str):
        return None, written
    return StepGraphs(**written), None


def _write_graphs(inputs: StageInputs, name: str, rewrite: Callable[..., None]) -> Any:
    """Write the models rewritten; the fields of their record, or in a line why there are none."""
    export = inputs.upstream["export"].resolve()
    positions = context_length(export)
    folder = inputs.output.resolve() / name
    folder.mkdir()
    written: dict[str, Path | None] = {"dense_model": None}
    try:
        for field, (file, path) in _sides(inputs, export).items():
            graph = ir.load(path)
            rewrite(graph, positions=positions)
            written[field] = folder / file
            (folder / file).write_bytes(ir.to_proto(graph).SerializeToString())
    except NotRewritableError as error:
        shutil.rmtree(folder)
        inputs.progress.note(f"engine: the exported graph runs as it is: {error}")
        return str(error)
    return {**written, "positions": positions}


def _sides(inputs: StageInputs, export: Path) -> dict[str, tuple[str, Path]]:
    """The models to rewrite: by field, the file to write and the exported one."""
    sides = {"model": (MODEL, export / MODEL)}
    if inputs.recipe.model.dense_baseline:
        sides["dense_model"] = ("dense.onnx", export / DENSE / MODEL)
    path = stored_model(export)
    if path is not None:
        sides["stored_model"] = ("stored.onnx", path)
    return sides
