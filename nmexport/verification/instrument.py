"""Adds counters and outputs to an exported graph, so that a run shows what each linear keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

from nmexport.errors import ArtifactError
from nmexport.graph.contract import attribute_values, check_version, op_contract, present_inputs
from nmexport.graph.functions import function_protos_for
from nmexport.graph.linears import PlacedLinear, placed_linears

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from nmexport.store.layers import LayerSpec

_PREFIX = "nmexport_audit/"
_FLOAT = TensorProto.FLOAT


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Output that counts a linear's kept elements."""

    layer: str
    output: str
    channels: int
    """In_features: elements a token."""
    phase: str

    def counts(self, new_tokens: int) -> bool:
        """Tell whether a run of `new_tokens` a sequence is sparse here."""
        return is_sparse(self.phase, new_tokens)


def is_sparse(phase: str, new_tokens: int) -> bool:
    """Tell whether a linear of a phase is sparse in a run of `new_tokens` a sequence."""
    return phase == "all" or (phase == "decode") == (new_tokens == 1)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a model without its weights.

    Raises:
        ArtifactError: if it is missing, no ONNX model, or of another version of the op contract.
    """
    try:
        model: onnx.ModelProto = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors, by backend
        raise ArtifactError(f"{path} cannot be read: {error}", fix="export again") from error
    check_version({entry.domain: entry.version for entry in model.opset_import}, str(path))
    return model


def sparse_linears(model: onnx.ModelProto) -> dict[str, PlacedLinear]:
    """List the linears that are nodes of ours by name, in graph order; fused ones share a node."""
    return placed_linears(model.graph, "NMLinear", domain=op_contract().domain)


def add_counters(model: onnx.ModelProto, layers: Sequence[LayerSpec]) -> list[Counter]:
    """Give each sparsified linear an output that counts the elements it keeps; in place.

    Linears that are fused keep the same elements, and share the output.

    Args:
        model: The exported sparse model.
        layers: Its sparsified linears.

    Raises:
        ArtifactError: if the model lacks a node for one of the layers.
    """
    linears = sparse_linears(model)
    missing = [layer.name for layer in layers if layer.name not in linears]
    if missing:
        raise ArtifactError(
            f"The model has no NMLinear node for {missing[0]} ({len(missing)} such linears).",
            fix="export again: model and layers.json are not of one build",
        )
    nodes = {linears[layer.name].node.name: linears[layer.name].node for layer in layers}
    outputs: dict[str, str] = {}
    prunes = []
    for name, node in nodes.items():
        added = list(_counting_nodes(node))
        prunes += [node for node in added if node.op_type == "NMPrune"]
        model.graph.node.extend(added)
        outputs[name] = added[-1].output[0]
        model.graph.output.append(
            helper.make_tensor_value_info(outputs[name], TensorProto.INT64, [])
        )
    _add_prune_functions(model, prunes)
    return [
        Counter(
            layer=layer.name,
            output=outputs[linears[layer.name].node.name],
            channels=layer.in_features,
            phase=str(attribute_values(linears[layer.name].node)["phase"]),
        )
        for layer in layers
    ]


def _counting_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Make nodes that select on the linear's input as the linear does; the last one counts."""
    given = dict(
        zip(
            (spec.name for spec in op_contract().ops["NMLinear"].inputs),
            node.input,
            strict=False,
        )
    )
    present = present_inputs(node)
    values = attribute_values(node)
    base = f"{_PREFIX}{node.name}/"
    x = given["X"]
    if "channel_order" in present:
        x = f"{base}gathered"
        yield helper.make_node("Gather", [given["X"], given["channel_order"]], [x], axis=-1)
    yield helper.make_node("Cast", [x], [f"{base}x"], to=_FLOAT)
    shifted = f"{base}x"
    if values["dynamic_shift"]:
        yield helper.make_node("Constant", [], [f"{base}axis"], value_ints=[-1])
        yield helper.make_node("ReduceMean", [shifted, f"{base}axis"], [f"{base}eta"], keepdims=1)
        yield helper.make_node("Sub", [shifted, f"{base}eta"], [f"{base}z"])
        shifted = f"{base}z"
    elif "shift" in present:
        yield helper.make_node("Sub", [shifted, given["shift"]], [f"{base}z"])
        shifted = f"{base}z"
    optional = [given["score_scale"]] if "score_scale" in present else []
    yield helper.make_node(
        "NMPrune",
        [shifted, *optional],
        [f"{base}s"],
        name=f"{base}select",
        domain=op_contract().domain,
        n=values["n"],
        m=values["m"],
    )
    yield helper.make_node("Constant", [], [f"{base}zero"], value_float=0.0)
    yield helper.make_node("Equal", [f"{base}s", f"{base}zero"], [f"{base}is_zero"])
    yield helper.make_node("Not", [f"{base}is_zero"], [f"{base}is_kept"])
    yield helper.make_node("Cast", [f"{base}is_kept"], [f"{base}ones"], to=TensorProto.INT64)
    yield helper.make_node("ReduceSum", [f"{base}ones"], [f"{base}kept"], keepdims=0)


def _add_prune_functions(model: onnx.ModelProto, prunes: list[onnx.NodeProto]) -> None:
    """Add bodies for the selection nodes, for a session without the native library."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"})
    # Nodes that extend() copied into the graph are told their overload here.
    names = {node.name for node in prunes}
    inside = [node for node in model.graph.node if node.name in names]
    held = {(function.domain, function.name, function.overload) for function in model.functions}
    for function in function_protos_for(inside, opset=opset):
        if (function.domain, function.name, function.overload) not in held:
            model.functions.append(function)


def add_layer_outputs(
    model: onnx.ModelProto, values: Mapping[str, str], *, kind: str = "output"
) -> dict[str, str]:
    """Turn values of the graph into outputs of the model, as float32; in place.

    Args:
        model: Dense or sparse.
        values: Name of a value in the graph, by layer.
        kind: What the values are to the layers; part of the outputs' names.

    Returns:
        Name of the output, by layer.

    Raises:
        ArtifactError: if the graph has no such value.
    """
    known = {name for node in model.graph.node for name in node.output}
    outputs = {}
    for layer, value in values.items():
        if value not in known:
            raise ArtifactError(
                f"The model has no value {value} for the {kind} of {layer}.", fix="export again"
            )
        outputs[layer] = f"{_PREFIX}{layer}/{kind}"
        model.graph.node.append(helper.make_node("Cast", [value], [outputs[layer]], to=_FLOAT))
        model.graph.output.append(helper.make_empty_tensor_value_info(outputs[layer]))
    return outputs
