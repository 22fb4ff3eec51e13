"""Export as it runs: the models that it writes, and the configuration next to them."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from nmexport.errors import EnvironmentFault
from nmexport.graph import assembly, checks
from nmexport.graph.assembly import DenseWeights
from nmexport.graph.embedding import store_embedding
from nmexport.graph.passes import optimise
from nmexport.models.embedding import embedding_names
from nmexport.models.genai_config import genai_config
from nmexport.models.lazy_tensors import defer, defer_group
from nmexport.models.loader import load_tokenizer
from nmexport.models.stored_rows import imported_rows, rounded_rows
from nmexport.models.streaming import open_for_export
from nmexport.models.tokenizer_files import write_tokenizer
from nmexport.models.tracing import cache_shapes, trace
from nmexport.progress import busy
from nmexport.report.model import DenseParity
from nmexport.stages import fold
from nmexport.stages.export import DENSE_CHECK
from nmexport.store.exported import DENSE, GENAI_CONFIG, MODEL, STORED
from nmexport.store.layers import as_dense
from nmexport.store.records import json_from
from nmexport.verification.dense_check import TorchModel, check

_NO_ROOM = "without the dense baseline, the disk has no room for a dense file to hold against torch"

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from transformers import PreTrainedModel

    from nmexport.graph.embedding import StoredRows
    from nmexport.models.source import ModelSource
    from nmexport.stages.inputs import StageInputs
    from nmexport.store.folded import FoldedModel
    from nmexport.store.layers import LayerSpec

    Tensors = Callable[[str], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Stored:
    """How the parts that weights in integers bring are written."""

    rows: Callable[[], StoredRows | None]
    """The rows of the input embedding in integers; None leaves it as it is."""
    dense_tensors: Callable[[str], Mapping[str, torch.Tensor]] | None
    """Folded tensors of a linear as a dense one; None writes no dense model of this kind."""


class TracedModel(NamedTuple):
    """A traced model, its graph cleaned: both files are assembled from it."""

    model: PreTrainedModel
    read: Callable[[str], torch.Tensor]
    """Reads a parameter by its name."""
    graph: ir.Model
    nodes: int
    """Nodes as traced, before cleaning."""


def run(inputs: StageInputs) -> dict[str, object]:
    """Trace, clean, assemble, write and check both models; write config and tokenizer with them.

    Raises:
        ModelError: if the model cannot be loaded or its architecture cannot be exported.
        InternalError: if what was written is not what it should be.
    """
    section = inputs.recipe.model
    folded = fold.Artifact(inputs.upstream["fold"])
    with busy(inputs.progress, "export: load the model"):
        opened = open_for_export(inputs.source, dtype=getattr(torch, section.dtype))
    model = opened.model
    inputs.progress.note(f"export: {model.config.model_type}")
    _check_disk(inputs, model, len(folded.layers))
    checked = section.dense_baseline or _has_room(inputs, model, copies=2)
    with busy(inputs.progress, "export: trace and write"):
        traced = trace_model(
            model, [layer.name for layer in folded.linears], parameter=opened.parameter
        )
        metrics = write_models(
            traced,
            folded.linears,
            folded.tensors,
            inputs.output,
            dense_baseline=checked,
            stored=stored_parts(
                folded, traced, inputs.source, dense_baseline=section.dense_baseline
            ),
        )
    with busy(inputs.progress, "export: hold the dense model against torch"):
        dense_check = _check_dense(inputs, model) if checked else DenseParity(why=_NO_ROOM)
    metrics["dense_check"] = json_from(dense_check)
    if checked and not section.dense_baseline:
        shutil.rmtree(inputs.output / DENSE)
    text = json.dumps(metrics["dense_check"], indent=1) + "\n"
    (inputs.output / DENSE_CHECK).write_text(text, encoding="utf-8")
    write_configs(model, inputs.output)
    write_tokenizer(load_tokenizer(inputs.source), inputs.output)
    return metrics


def stored_parts(
    folded: FoldedModel, traced: TracedModel, source: ModelSource, *, dense_baseline: bool
) -> Stored | None:
    """Describe weights in integers; None where they are float."""
    if not folded.is_quantised:
        return None
    rows: Callable[[], StoredRows | None] = lambda: None  # noqa: E731
    if folded.embedding_bits:
        rows = functools.partial(rounded_rows, traced.model, traced.read)
    elif folded.kept is not None:
        rows = functools.partial(imported_rows, traced.model, source)
    return Stored(rows, folded.dense_tensors if dense_baseline else None)


def trace_model(
    model: PreTrainedModel,
    linears: Sequence[str],
    *,
    parameter: Callable[[str], torch.Tensor] | None = None,
) -> TracedModel:
    """Trace a model with the named linears as bare nodes, and clean its graph.

    Args:
        model: The dense model in its export type; as before afterwards.
        linears: Names of its sparsified linears.
        parameter: Reads a parameter of the model, where the model itself holds fake ones.

    Raises:
        ModelError: if the architecture cannot be exported.
    """
    read = parameter or (lambda name: model.get_parameter(name).detach())
    graph = trace(model, linears)
    _attach_parameters(graph, model, read)
    nodes = len(graph.graph)
    optimise(graph)
    return TracedModel(model, read, graph, nodes)


def write_models(
    traced: TracedModel,
    layers: Sequence[LayerSpec],
    tensors: Callable[[str], Mapping[str, torch.Tensor]],
    output: Path,
    *,
    dense_baseline: bool = True,
    stored: Stored | None = None,
) -> dict[str, object]:
    """Write `model.onnx` and `dense/model.onnx`, each with its data file, and check both.

    Args:
        traced: The model; as before afterwards.
        layers: Its linears that are nodes of ours: the sparsified ones, and with weights in
            integers all of them.
        tensors: Folded tensors of one linear, by their names in the op contract.
        output: An existing folder.
        dense_baseline: Whether to write the dense model too.
        stored: With weights in integers: the input embedding has integers too, and the dense model
            is also written in them, as `dense/stored/model.onnx`.

    Returns:
        Metrics: nodes traced and left, bytes of weights.

    Raises:
        InternalError: if what was written is not what it should be.
    """
    specs = {layer.name: layer for layer in layers}

    def write(path: Path, specs: Mapping[str, LayerSpec], tensors: Tensors) -> None:
        def constants(name: str) -> Mapping[str, ir.TensorProtocol]:
            return defer_group(tensors(name), prefix=name, weight_type=specs[name].weight_type)

        made = assembly.assemble_sparse(traced.graph, specs, constants)
        rows = None if stored is None else stored.rows()
        if rows is not None:
            store_embedding(made, embedding_names(traced.model), rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        assembly.save(made, path)
        checks.check_sparse(path, specs)

    path, dense_path = output / MODEL, output / DENSE / MODEL
    write(path, specs, tensors)
    if stored is not None and stored.dense_tensors is not None:
        dense_specs = {name: as_dense(layer) for name, layer in specs.items()}
        write(output / DENSE / STORED / MODEL, dense_specs, stored.dense_tensors)
    if dense_baseline:
        dense_path.parent.mkdir(exist_ok=True)
        weights = functools.partial(_original_weights, traced.model, traced.read)
        assembly.save(assembly.assemble_dense(traced.graph, specs, weights), dense_path)
        checks.check_dense(dense_path, specs)
    return {
        "traced_nodes": traced.nodes,
        "nodes": len(traced.graph.graph),
        "sparse_linears": len(specs),
        "data_bytes": path.with_name(f"{MODEL}.data").stat().st_size,
    }


def _attach_parameters(
    traced: ir.Model, model: PreTrainedModel, read: Callable[[str], torch.Tensor]
) -> None:
    """Let the graph's parameters be read when they are written, not held."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in traced.graph.initializers.items():
        if name in parameters:
            value.const_value = defer(
                functools.partial(read, name), like=parameters[name], name=name
            )


def _original_weights(
    model: PreTrainedModel, read: Callable[[str], torch.Tensor], name: str
) -> DenseWeights:
    """Weight and bias of a linear as they were, in the order that MatMul reads."""
    weight = model.get_parameter(f"{name}.weight")  # [O, K]
    bias = model.get_submodule(name).bias
    names = embedding_names(model)
    return DenseWeights(
        tied=names[0] if model.get_parameter(names[0]) is weight else None,
        weight=defer(lambda: read(f"{name}.weight").t(), like=weight.t(), name=f"{name}.W"),
        bias=None
        if bias is None
        else defer(lambda: read(f"{name}.bias"), like=bias, name=f"{name}.bias"),
    )


def write_configs(model: PreTrainedModel, output: Path) -> None:
    """Write `config.json`, `generation_config.json` and `genai_config.json`."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(output)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(output)
    document = genai_config(model.config, generation, cache_shapes(model), filename=MODEL)
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    (output / GENAI_CONFIG).write_text(text, encoding="utf-8")


def _check_disk(inputs: StageInputs, model: PreTrainedModel, linears: int) -> None:
    """Say what will be written, and refuse where it does not fit.

    Raises:
        EnvironmentFault: if the disk has too little room.
    """
    copies = 2 if inputs.recipe.model.dense_baseline else 1
    needed, free = _bytes_written(model, copies), shutil.disk_usage(inputs.output).free
    inputs.progress.note(
        f"export: {linears} sparse linears; writes up to {needed / 1e9:.2f} GB, "
        f"{free / 1e9:.0f} GB free"
    )
    if not _has_room(inputs, model, copies):
        raise EnvironmentFault(
            f"Export writes up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
            f"{inputs.output}.",
            fix="choose another --work, or leave out the dense model with --no-dense-baseline",
        )


def _bytes_written(model: PreTrainedModel, copies: int) -> int:
    size: int = sum(value.numel() * value.element_size() for value in model.parameters())
    return copies * size


def _has_room(inputs: StageInputs, model: PreTrainedModel, copies: int) -> bool:
    return _bytes_written(model, copies) <= shutil.disk_usage(inputs.output).free


def _check_dense(inputs: StageInputs, model: PreTrainedModel) -> DenseParity:
    """Hold the dense file against torch.

    Raises:
        ModelError: if they differ by more than rounding.
    """
    section = inputs.recipe.model
    result = check(
        inputs.output / DENSE / MODEL,
        inputs.output / MODEL,
        TorchModel(
            source=inputs.source,
            dtype=section.dtype,
            offload=inputs.recipe.calibration.offload,
            folder=inputs.output,
        ),
        vocabulary=model.config.get_text_config().vocab_size,
        progress=inputs.progress,
    )
    inputs.progress.note(
        f"export: dense ONNX agrees with torch to {result.error:.1e} "
        f"(rounding in {section.dtype} explains {result.tolerance:g})"
    )
    return result
