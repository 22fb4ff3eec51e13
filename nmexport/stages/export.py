"""Export: the sparse model and its dense baseline as ONNX, with all that a runtime needs beside."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError
from nmexport.stages import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel

    from nmexport.graph.assembly import DenseWeights
    from nmexport.layers import LayerSpec
    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ("fold",)

MODEL = "model.onnx"
DENSE = "dense"
GENAI_CONFIG = "genai_config.json"
# Packages that write the graph: another version may write another one.
_WRITERS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "tokenizers")


@dataclass(frozen=True)
class Artifact:
    """A finished export."""

    path: Path

    @property
    def model(self) -> Path:
        """The sparse model."""
        return self._existing(self.path / MODEL)

    @property
    def dense_model(self) -> Path:
        """The baseline: the same graph with plain MatMul and original weights."""
        return self._existing(self.path / DENSE / MODEL)

    def _existing(self, path: Path) -> Path:
        for file in (path, path.with_name(f"{path.name}.data")):
            if not file.is_file():
                raise ArtifactError(
                    f"The export lacks {file}.", fix="run the build with --force export"
                )
        return path


def key_fields(inputs: StageInputs) -> dict[str, Any]:
    """The model and what writes it."""
    from nmexport.graph.functions import IR_VERSION, OPSET

    section = inputs.recipe.model
    return {
        "model": inputs.source.digest,
        "dtype": section.dtype,
        "trust_remote_code": section.trust_remote_code,
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "writers": {name: inputs.environment.version(name) for name in _WRITERS},
    }


def run(inputs: StageInputs) -> dict[str, Any]:
    """Trace, clean, assemble, write and check both models; write config and tokenizer beside.

    Raises:
        ModelError: if the model cannot be loaded or its architecture cannot be exported.
        InternalError: if what was written is not what it should be.
    """
    from nmexport.models.loader import load_model, load_tokenizer
    from nmexport.models.tokenizer_files import write_tokenizer

    section = inputs.recipe.model
    trusted = section.trust_remote_code
    folded = fold.Artifact(inputs.upstream["fold"])
    model = load_model(inputs.source, dtype=section.dtype, trust_remote_code=trusted)
    inputs.progress.note(f"export: {model.config.model_type}, {len(folded.layers)} sparse linears")
    metrics = write_models(model, folded.layers, folded.tensors, inputs.output)
    write_configs(model, inputs.output)
    write_tokenizer(load_tokenizer(inputs.source, trust_remote_code=trusted), inputs.output)
    return metrics


def write_models(
    model: PreTrainedModel,
    layers: Sequence[LayerSpec],
    tensors: Callable[[str], Mapping[str, torch.Tensor]],
    output: Path,
) -> dict[str, Any]:
    """Write `model.onnx` and `dense/model.onnx`, each with its data file, and check both.

    Args:
        model: The dense model in its export type; as before afterwards.
        layers: Its sparsified linears.
        tensors: Folded tensors of one linear, by their names in the op contract.
        output: An existing folder.

    Returns:
        Metrics: nodes traced and left, bytes of weights.

    Raises:
        ModelError: if the architecture cannot be exported.
        InternalError: if what was written is not what it should be.
    """
    from nmexport.graph import assembly, checks
    from nmexport.graph.passes import optimise
    from nmexport.models.tensors import deferred_group
    from nmexport.models.tracing import trace

    specs = {layer.name: layer for layer in layers}
    traced = trace(model, list(specs))
    traced_nodes = len(traced.graph)
    optimise(traced)

    def constants(name: str) -> Mapping[str, ir.TensorProtocol]:
        return deferred_group(lambda: tensors(name), prefix=name)

    path, dense_path = output / MODEL, output / DENSE / MODEL
    dense_path.parent.mkdir()
    assembly.save(assembly.assemble_sparse(traced, specs, constants), path)
    weights = functools.partial(_original_weights, model)
    assembly.save(assembly.assemble_dense(traced, specs, weights), dense_path)
    checks.check_sparse(path, specs)
    checks.check_dense(dense_path, specs)
    return {
        "traced_nodes": traced_nodes,
        "nodes": len(traced.graph),
        "sparse_linears": len(specs),
        "data_bytes": path.with_name(f"{MODEL}.data").stat().st_size,
    }


def _original_weights(model: PreTrainedModel, name: str) -> DenseWeights:
    """Weight and bias of a linear as they were, in the order that MatMul reads."""
    from nmexport.graph.assembly import DenseWeights
    from nmexport.models.tensors import deferred

    weight = model.get_parameter(f"{name}.weight").detach().t()  # [K, O], a view
    bias = model.get_submodule(name).bias
    return DenseWeights(
        weight=deferred(lambda: weight, like=weight, name=f"{name}.W"),
        bias=None if bias is None else deferred(bias.detach, like=bias, name=f"{name}.bias"),
    )


def write_configs(model: PreTrainedModel, output: Path) -> None:
    """Write `config.json`, `generation_config.json` and `genai_config.json`."""
    from nmexport.models.genai_config import genai_config
    from nmexport.models.tracing import cache_shapes

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(output)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(output)
    document = genai_config(model.config, generation, cache_shapes(model), filename=MODEL)
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    (output / GENAI_CONFIG).write_text(text, encoding="utf-8")
