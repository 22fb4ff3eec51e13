"""The sparse engine and the dense one beside it, from one export: built, audited, described."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from nmexport.artifact import file_digest
from nmexport.engines import building, layer_audit
from nmexport.engines.profiles import limits_from, profiles_for
from nmexport.engines.timing_cache import timing_cache_path
from nmexport.graph.contract import op_contract
from nmexport.graph.tensorrt import for_tensorrt
from nmexport.progress import duration
from nmexport.runtimes import tensorrt_library
from nmexport.runtimes.tensorrt_engine import (
    DENSE_PLAN,
    PLAN,
    PluginRecord,
    TensorRTEngine,
)

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.engines.building import Order, Plan
    from nmexport.environment import Environment
    from nmexport.graph.tensorrt import Rewritten
    from nmexport.progress import Progress
    from nmexport.recipe import Recipe
    from nmexport.runtimes.tensorrt_library import TensorRTTarget

LAYERS = "layers.json"
LOG = "build.log"
# Measured with TensorRT-RTX 1.7 on two cores of 2.9 GHz: SmolLM2-135M, float16, two profiles.
_SECONDS = 10.0
_SECONDS_PER_PARAMETER = 1.5e-7
_COPIES = 3.0
"""Of the weights in memory at once: read by the parser, held by the network, put into the plan."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """Both engines."""

    engine: TensorRTEngine
    metrics: dict[str, Any]


def build_pair(
    *,
    target: TensorRTTarget,
    recipe: Recipe,
    environment: Environment,
    export: Path,
    output: Path,
    progress: Progress,
) -> Built:
    """Build both engines and write plans, layer list and log.

    Args:
        target: TensorRT or TensorRT-RTX.
        recipe: Sizes and GPUs to build for.
        environment: Which GPU is here, for the timing cache.
        export: Folder of the exported models.
        output: An existing folder for `model.plan`, `dense.plan`, `layers.json` and `build.log`.
        progress: Where to count.

    Raises:
        EnvironmentFault: if TensorRT, Polygraphy, the plugin library or a GPU is missing here.
        ArtifactError: if TensorRT refuses a graph.
        InternalError: if an engine is not what was asked for.
    """
    limits = limits_from(recipe)
    plugin = tensorrt_library.require_plugin()
    module = tensorrt_library.load(target)
    cache = None
    if target == "tensorrt":  # NO_TIMING_CACHE says why not for the other
        device = environment.gpus[0].name if environment.gpus else "no gpu"
        cache = timing_cache_path(runtime=target, version=module.__version__, device=device)
    in_place = recipe.engine.in_place_cache == "auto"
    rewritten = functools.partial(for_tensorrt, capacity=limits.max_context if in_place else None)
    sparse = rewritten(export / "model.onnx")
    dense = rewritten(export / "dense" / "model.onnx")
    weights = weight_bytes(sparse.model)
    progress.note(_announcement(target, recipe, weights))

    def order(rewritten: Rewritten, source: Path, label: str, *, with_plugin: bool) -> Order:
        return building.Order(
            target=target,
            model=ir.to_proto(rewritten.model).SerializeToString(),
            weights_beside=source,
            profiles=profiles_for(input_axes(rewritten.model), limits),
            compute_capabilities=recipe.engine.compute_capabilities,
            plugin=plugin if with_plugin else None,
            embed_plugin=with_plugin and recipe.engine.embed_plugin,
            timing_cache=cache,
            label=label,
        )

    plan = building.build(
        order(sparse, export / "model.onnx", "engine: sparse", with_plugin=True), progress
    )
    (output / PLAN).write_bytes(plan.data)
    audited = layer_audit.audit(
        network=plan.layers,
        plan=plan.data,
        inspector=inspect(target, plan.data),
        nodes=sparse_nodes(sparse.model),
        weight_bytes=weights,
        devices=max(1, len(recipe.engine.compute_capabilities)),
        plugin_bytes=plugin.stat().st_size if recipe.engine.embed_plugin else 0,
    )
    (output / LAYERS).write_text(json.dumps(audited.as_dict(), indent=1) + "\n", encoding="utf-8")
    dense_plan = building.build(
        order(dense, export / "dense" / "model.onnx", "engine: dense", with_plugin=False), progress
    )
    (output / DENSE_PLAN).write_bytes(dense_plan.data)
    _write_log(output / LOG, sparse=plan, dense=dense_plan)
    engine = TensorRTEngine(
        target=target,
        version=module.__version__,
        dtype=recipe.model.dtype,
        compute_capabilities=recipe.engine.compute_capabilities,
        in_place_cache=sparse.in_place,
        why_not_in_place=sparse.why_not_in_place,
        attention="fused" if sparse.fused_attention else "elementary",
        max_batch=limits.max_batch,
        max_sequence=limits.max_sequence,
        max_context=limits.max_context,
        profiles=tuple(p.name for p in profiles_for(input_axes(sparse.model), limits)),
        plugin=PluginRecord(
            file=plugin.name,
            sha256=file_digest(plugin),
            version=tensorrt_library.describe_plugin(plugin)["version"],
            embedded=recipe.engine.embed_plugin,
        ),
        tensors=plan.tensors,
    )
    metrics = {
        **_metrics(engine, audited, plan, dense_plan),
        "limits": vars(limits),
        "timing_cache": None if cache is None else cache.name,
        "why_no_timing_cache": building.NO_TIMING_CACHE if cache is None else None,
    }
    return Built(engine=engine, metrics=metrics)


def _metrics(
    engine: TensorRTEngine, audited: layer_audit.LayerAudit, sparse: Plan, dense: Plan
) -> dict[str, Any]:
    return {
        "target": engine.target,
        "version": engine.version,
        "compute_capabilities": list(engine.compute_capabilities),
        "plan_bytes": {"sparse": len(sparse.data), "dense": len(dense.data)},
        "weight_bytes": audited.weight_bytes,
        "parse_seconds": {"sparse": sparse.parse_seconds, "dense": dense.parse_seconds},
        "build_seconds": {"sparse": sparse.build_seconds, "dense": dense.build_seconds},
        "plugin_layers": dict(audited.plugin_layers),
        "layers_from": audited.source,
        "attention": engine.attention,
        "cache": "in place" if engine.in_place_cache else "concatenated",
        "why_not_in_place": engine.why_not_in_place,
    }


def input_axes(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """Axes of each graph input: a size, or the product's name of the axis."""
    return {
        str(value.name): tuple(
            size if isinstance(size, int) else size.value for size in value.shape or ()
        )
        for value in model.graph.inputs
    }


def sparse_nodes(model: ir.Model) -> list[str]:
    """Names of the nodes of our domain."""
    domain = op_contract().domain
    return [str(node.name) for node in model.graph if node.domain == domain]


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the initializers, each once."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def inspect(target: TensorRTTarget, plan: bytes) -> str | None:
    """The inspector's JSON on a plan; None where it cannot be opened here."""
    if not tensorrt_library.gpu_is_usable():
        return None
    trt = tensorrt_library.load(target)
    engine = trt.Runtime(tensorrt_library.logger_of(target)).deserialize_cuda_engine(plan)
    if engine is None:  # for another GPU than the one here
        return None
    told: str = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    return told


def _announcement(target: TensorRTTarget, recipe: Recipe, weights: int) -> str:
    element = 4 if recipe.model.dtype == "float32" else 2
    capabilities = recipe.engine.compute_capabilities
    seconds = _SECONDS + _SECONDS_PER_PARAMETER * weights / element * max(1, len(capabilities))
    devices = ", ".join(capabilities) or "the GPU here"
    return (
        f"engine: {target} for {devices}, sparse and dense, about {duration(2 * seconds)} and "
        f"{_COPIES * weights / 1e9:.1f} GB of memory"
    )


def _write_log(path: Path, **plans: Plan) -> None:
    lines = [f"[{name}] {line}" for name, plan in plans.items() for line in plan.log]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
