"""Checks of an exported file: each finds the damage it is there for."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nmexport.errors import InternalError
from nmexport.graph.assembly import (
    LAYER_ATTRIBUTE,
    LINEAR,
    DenseWeights,
    assemble_dense,
    assemble_sparse,
)
from nmexport.graph.checks import check_dense, check_sparse
from nmexport.sparsity.linear import Behaviour

from tests.support.exported import PATTERN, specs_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nmexport.store.layers import LayerSpec

    from tests.support.exported import Exported

HEAD = 64


@pytest.fixture(scope="module")
def intact(plain_export: Exported) -> tuple[Path, dict[str, LayerSpec]]:
    specs = specs_of(plain_export.dense, Behaviour(pattern=PATTERN))
    return plain_export.folder, {spec.name: spec for spec in specs}


def linears(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "NMLinear"]


def rename_a_node(model: onnx.ModelProto) -> None:
    linears(model)[0].name = "something"


def drop_an_attribute(model: onnx.ModelProto) -> None:
    del linears(model)[0].attribute[0]


def swap_weights(model: onnx.ModelProto) -> None:
    first, second = (node for node in linears(model) if node.name.endswith("gate_proj+up_proj"))
    first.input[1], second.input[1] = second.input[1], first.input[1]


def forget_what_was_fused(model: onnx.ModelProto) -> None:
    del linears(model)[0].metadata_props[:]


def swap_fused_linears(model: onnx.ModelProto) -> None:
    node = linears(model)[0]
    names = node.metadata_props[0].value.split("\n")
    node.metadata_props[0].value = "\n".join([names[0], *names[:0:-1]])


def cut_elsewhere(model: onnx.ModelProto) -> None:
    sizes = next(item for item in model.graph.initializer if item.name == "split_sizes_64_32_32")
    sizes.CopyFrom(onnx.numpy_helper.from_array(np.array([32, 64, 32]), sizes.name))


def leave_a_fused_result_whole(model: onnx.ModelProto) -> None:
    split = next(node for node in model.graph.node if node.op_type == "Split")
    split.op_type = "SplitToSequence"


def change_a_shape(model: onnx.ModelProto) -> None:
    name = linears(model)[0].input[1]
    weight = next(item for item in model.graph.initializer if item.name == name)
    weight.dims[:] = [32, 128]


def make_a_scale(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Cos", ["model.norm.weight"], ["made"], name="maker")
    model.graph.node.insert(0, node)
    reader = linears(model)[0]
    reader.input.extend([""] * (5 - len(reader.input)) + ["made"])


def repeat_a_channel(model: onnx.ModelProto) -> None:
    order = np.array([0, 1, 1, *range(3, 64)], np.int32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(order, "order"))
    reader = linears(model)[0]
    reader.input.extend([""] * (6 - len(reader.input)) + ["order"])


def leave_the_dense_weight(model: onnx.ModelProto) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rename(model, "model.norm.weight", name)
    next(item for item in model.graph.initializer if item.name == "model.norm.weight").name = name


def leave_a_constant(model: onnx.ModelProto) -> None:
    add_initializer(model, "nobody")


def leave_a_node(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("Cos", ["model.norm.weight"], ["idle"], name="idle")
    model.graph.node.append(node)


def rename_an_input(model: onnx.ModelProto) -> None:
    rename(model, "attention_mask", "mask")


def rename_a_state(model: onnx.ModelProto) -> None:
    rename(model, "past_key_values.0.key", "past.0.key")


def rename_an_axis(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"


def rename_the_logits(model: onnx.ModelProto) -> None:
    rename(model, "logits", "scores")


def drop_the_bodies(model: onnx.ModelProto) -> None:
    del model.functions[:]


def break_the_graph(model: onnx.ModelProto) -> None:
    model.graph.node[-1].input[0] = "never_made"


def add_initializer(model: onnx.ModelProto, name: str) -> None:
    model.graph.initializer.append(onnx.helper.make_tensor(name, 1, [1], [0.0]))


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for item in (*model.graph.input, *model.graph.output):
        if item.name == old:
            item.name = new
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def test_intact(intact: tuple[Path, dict[str, LayerSpec]]) -> None:
    folder, layers = intact
    check_sparse(folder / "model.onnx", layers)
    check_dense(folder / "dense" / "model.onnx", layers)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (rename_a_node, "one by one"),
        (forget_what_was_fused, "one by one"),
        (swap_fused_linears, "one by one"),
        (cut_elsewhere, r"cut into \[32, 64, 32\] columns, not \[64, 32, 32\]"),
        (leave_a_fused_result_whole, "no Split|checker"),
        (drop_an_attribute, "op contract"),
        (swap_weights, "its own weight"),
        (change_a_shape, "has shape"),
        (make_a_scale, "reads made, which is no initializer"),
        (repeat_a_channel, "order is no permutation of 0 to 63"),
        (leave_the_dense_weight, "left behind"),
        (leave_a_constant, "without use"),
        (leave_a_node, "without use"),
        (rename_an_input, "has inputs"),
        (rename_a_state, "has states"),
        (rename_an_axis, "has inputs"),
        (rename_the_logits, "must be logits"),
        (drop_the_bodies, "function bodies|checker"),
        (break_the_graph, "checker"),
    ],
)
def test_damage(
    intact: tuple[Path, dict[str, LayerSpec]],
    tmp_path: Path,
    damage: Callable[[onnx.ModelProto], None],
    words: str,
) -> None:
    folder, layers = intact
    path = shutil.copytree(folder, tmp_path / "copy") / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    damage(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InternalError, match=words):
        check_sparse(path, layers)


def test_bytes_that_nobody_reads(intact: tuple[Path, dict[str, LayerSpec]], tmp_path: Path) -> None:
    folder, layers = intact
    path = shutil.copytree(folder, tmp_path / "copy") / "model.onnx"
    with path.with_name("model.onnx.data").open("ab") as file:
        file.write(b"left over")
    with pytest.raises(InternalError, match="no initializer"):
        check_sparse(path, layers)


def test_sparse_model_is_no_baseline(intact: tuple[Path, dict[str, LayerSpec]]) -> None:
    folder, layers = intact
    with pytest.raises(InternalError, match="standard ONNX"):
        check_dense(folder / "model.onnx", layers)


def test_layers_without_a_node(intact: tuple[Path, dict[str, LayerSpec]]) -> None:
    """Assembly refuses a trace that does not have the layers it is told of."""
    folder, layers = intact
    traced = ir.load(folder / "dense" / "model.onnx")
    with pytest.raises(InternalError, match="without a node"):
        assemble_sparse(traced, layers, lambda _: {})
    with pytest.raises(InternalError, match="without a node"):
        assemble_dense(traced, layers, lambda _: DenseWeights(ir.tensor([0.0]), None))


def test_constant_that_no_input_takes(intact: tuple[Path, dict[str, LayerSpec]]) -> None:
    name, spec = next(iter(intact[1].items()))
    x = ir.Value(name="x", shape=ir.Shape([1, HEAD]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("nmexport", LINEAR, [x], [ir.AttrString(LAYER_ATTRIBUTE, name)])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}, name="bare")
    tensors = {"W": ir.tensor(np.zeros((HEAD, HEAD))), "low_rank": ir.tensor([0.0])}
    with pytest.raises(InternalError, match="low_rank"):
        assemble_sparse(ir.Model(graph, ir_version=10), {name: spec}, lambda _: tensors)
