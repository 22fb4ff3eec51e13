"""The sparse and the dense engine of one export: built, audited, described."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from nmexport.errors import EnvironmentFault, InternalError
from nmexport.graph.contract import op_contract
from nmexport.graph.matching import is_op
from nmexport.graph.separate_cache import ATTENTION_OP
from nmexport.graph.tensorrt import SCATTER_OP, for_tensorrt
from nmexport.progress import duration
from nmexport.runtimes.engine import (
    DENSE_PLAN,
    PLAN,
    BuildRecord,
    PluginRecord,
    TensorRTEngine,
)
from nmexport.runtimes.tensorrt import building, layer_audit, requirements, weight_copies
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt.kernel_cache import timing_cache_path
from nmexport.runtimes.tensorrt.profiles import PROFILES, limits_from, profiles_for
from nmexport.store.artifact import file_digest
from nmexport.store.exported import DENSE, MODEL
from nmexport.store.records import json_from, write_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nmexport.environment import Environment
    from nmexport.graph.tensorrt import Rewritten
    from nmexport.progress import Progress
    from nmexport.recipe import Recipe
    from nmexport.runtimes.engine import TensorRTTarget
    from nmexport.runtimes.tensorrt.building import Plan
    from nmexport.runtimes.tensorrt.profiles import Limits
    from nmexport.runtimes.tensorrt.weight_copies import Weight

LAYERS = "layers.json"
LOG = "build.log"
# Measured with TensorRT-RTX 1.7 on two cores of 2.9 GHz: SmolLM2-135M, float16, two profiles.
# For four kinds of GPU it takes no longer than for one.
_SECONDS = 2.0
_SECONDS_PER_PARAMETER = 8e-8
_COPIES = 3.0
"""Copies of the weights in memory: one each in the parser, the network and the plan."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """Both engines."""

    engine: TensorRTEngine
    record: BuildRecord
    metrics: dict[str, object]


@dataclass(frozen=True)
class _Side:
    """One of the two models."""

    source: Path
    plan_name: str
    label: str
    rewritten: Rewritten


def build_pair(
    *,
    target: TensorRTTarget,
    recipe: Recipe,
    environment: Environment,
    export: Path,
    output: Path,
    log: Path,
    progress: Progress,
) -> Built:
    """Build both engines and write plans, layer list and log.

    Args:
        target: TensorRT or TensorRT-RTX.
        recipe: Sizes and GPUs to build for.
        environment: Which GPU is here, for the timing cache.
        export: Folder of the exported models.
        output: An existing folder for `model.plan`, `dense.plan`, `layers.json` and `build.log`.
        log: Where the log is written meanwhile, and stays if the build fails.
        progress: Where to count.

    Raises:
        RecipeError: if the target does not build for the recipe's GPUs.
        EnvironmentFault: if TensorRT, Polygraphy, the plugin library or a GPU is missing here, or
            this TensorRT lacks an operator of the graph.
        ArtifactError: if TensorRT refuses a graph.
        InternalError: if an engine is not what was asked for.
    """
    requirements.check(target, recipe.engine.compute_capabilities)
    limits = limits_from(recipe)
    sparse, dense = _sides(target, recipe, export, limits)
    weights = weight_copies.weights_of(sparse.rewritten.model)
    progress.note(_announcement(target, recipe, sum(weight.size for weight in weights)))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    maker = _Maker(
        target=target,
        recipe=recipe,
        limits=limits,
        plugin=tensorrt_library.require_plugin(),
        timing_cache=_timing_cache(target, environment),
        output=output,
        log=log,
        progress=progress,
    )
    plan = maker.build(sparse, with_plugin=True)
    audited = maker.audit(plan, sparse, weights)
    dense_plan = maker.build(dense, with_plugin=False)
    if log.is_file():
        shutil.move(log, output / LOG)
    engine = maker.describe(plan, sparse, audited)
    record = maker.record(audited, plan, dense_plan)
    metrics = maker.metrics(engine, record, audited, plan, dense_plan)
    return Built(engine=engine, record=record, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """The parts that both builds share."""

    target: TensorRTTarget
    recipe: Recipe
    limits: Limits
    plugin: Path
    timing_cache: Path | None
    output: Path
    log: Path
    progress: Progress

    def build(self, side: _Side, *, with_plugin: bool) -> Plan:
        """Build a plan and write it."""
        section = self.recipe.engine
        order = building.Order(
            target=self.target,
            model=ir.to_proto(side.rewritten.model).SerializeToString(),
            weights_beside=side.source,
            profiles=profiles_for(input_axes(side.rewritten.model), self.limits),
            compute_capabilities=section.compute_capabilities,
            plugin=self.plugin if with_plugin else None,
            embed_plugin=with_plugin and section.embed_plugin,
            timing_cache=self.timing_cache,
            log=self.log,
            label=side.label,
        )
        plan = building.build(order, self.progress)
        _check_cache(side, plan)
        (self.output / side.plan_name).write_bytes(plan.data)
        return plan

    def audit(self, plan: Plan, side: _Side, weights: Sequence[Weight]) -> layer_audit.LayerAudit:
        """Check the sparse plan and write what was found."""
        embeds = self.recipe.engine.embed_plugin
        audited = layer_audit.audit(
            network=plan.layers,
            plan=plan.data,
            inspector=inspect(self.target, plan.data),
            nodes=sparse_nodes(side.rewritten.model),
            weights=weights,
            profiles=len(PROFILES),
            plugin_bytes=self.plugin.stat().st_size if embeds else 0,
            compiled=self.target == "tensorrt",
        )
        write_record(audited, self.output / LAYERS, schema=layer_audit.SCHEMA)
        return audited

    def describe(self, plan: Plan, side: _Side, audited: layer_audit.LayerAudit) -> TensorRTEngine:
        """Describe the sparse plan, and the dense one built alike, for a session."""
        recipe, limits = self.recipe, self.limits
        return TensorRTEngine(
            target=self.target,
            version=tensorrt_library.load(self.target).__version__,
            dtype=recipe.model.dtype,
            compute_capabilities=recipe.engine.compute_capabilities,
            in_place_cache=side.rewritten.in_place,
            why_not_in_place=side.rewritten.why_not_in_place,
            attention=audited.attention,
            max_batch=limits.max_batch,
            max_sequence=limits.max_sequence,
            max_context=limits.max_context,
            profiles=PROFILES,
            plugin=PluginRecord(
                file=self.plugin.name,
                sha256=file_digest(self.plugin),
                version=tensorrt_library.describe_plugin(self.plugin)["version"],
                embedded=recipe.engine.embed_plugin,
            ),
            tensors=plan.tensors,
        )

    def record(self, audited: layer_audit.LayerAudit, sparse: Plan, dense: Plan) -> BuildRecord:
        """Describe for the report what was built."""
        cache = self.timing_cache
        return BuildRecord(
            attention_layers=audited.attention_layers,
            attention_kernels=dict(audited.attention_kernels),
            plan_bytes={"sparse": len(sparse.data), "dense": len(dense.data)},
            weight_bytes=audited.weight_bytes,
            timing_cache=None if cache is None else cache.name,
            why_no_timing_cache=building.NO_TIMING_CACHE if cache is None else None,
        )

    def metrics(
        self,
        engine: TensorRTEngine,
        record: BuildRecord,
        audited: layer_audit.LayerAudit,
        sparse: Plan,
        dense: Plan,
    ) -> dict[str, object]:
        """Collect the stage's metrics."""
        return {
            **json_from(record),
            "target": engine.target,
            "version": engine.version,
            "compute_capabilities": list(engine.compute_capabilities),
            "weights_found": audited.weights_found,
            "parse_seconds": {"sparse": sparse.parse_seconds, "dense": dense.parse_seconds},
            "build_seconds": {"sparse": sparse.build_seconds, "dense": dense.build_seconds},
            "plugin_layers": dict(audited.plugin_layers),
            "layers_from": audited.source,
            "attention": engine.attention,
            "cache": "in place" if engine.in_place_cache else "concatenated",
            "why_not_in_place": engine.why_not_in_place,
            "limits": vars(self.limits),
        }


def _timing_cache(target: TensorRTTarget, environment: Environment) -> Path | None:
    if target != "tensorrt":  # NO_TIMING_CACHE says why
        return None
    device = environment.gpus[0].name if environment.gpus else "no gpu"
    version = tensorrt_library.load(target).__version__
    return timing_cache_path(runtime=target, version=version, device=device)


def _sides(
    target: TensorRTTarget, recipe: Recipe, export: Path, limits: Limits
) -> tuple[_Side, _Side]:
    """Open the sparse model and the dense one, with one kind of cache: one session reads both.

    Raises:
        EnvironmentFault: if this TensorRT has no attention.
    """
    sources = (export / MODEL, export / DENSE / MODEL)
    capacity, why = _cache_wanted(target, recipe, limits)
    rewritten = [for_tensorrt(path, capacity=capacity, why_no_capacity=why) for path in sources]
    refusing = [str(node.why_not_in_place) for node in rewritten if not node.in_place]
    if capacity is not None and refusing:
        rewritten = [
            for_tensorrt(path, capacity=None, why_no_capacity=refusing[0]) for path in sources
        ]
    _check_attention(target, rewritten[0])
    return (
        _Side(sources[0], PLAN, "engine: sparse", rewritten[0]),
        _Side(sources[1], DENSE_PLAN, "engine: dense", rewritten[1]),
    )


def _cache_wanted(target: TensorRTTarget, recipe: Recipe, limits: Limits) -> tuple[int | None, str]:
    """Return the capacity of an in-place cache; None, and why, where there is to be none."""
    if recipe.engine.in_place_cache == "off":
        return None, "not asked for"
    if not building.parser_takes(target, SCATTER_OP):
        version = tensorrt_library.load(target).__version__
        return None, f"the ONNX parser of {target} {version} has no {SCATTER_OP}"
    return limits.max_context, ""


def _check_attention(target: TensorRTTarget, rewritten: Rewritten) -> None:
    if not rewritten.fused_attention or building.parser_takes(target, ATTENTION_OP):
        return
    version = tensorrt_library.load(target).__version__
    raise EnvironmentFault(
        f"The model has {rewritten.fused_attention} {ATTENTION_OP} nodes, which the ONNX parser of "
        f"{target} {version} does not know.",
        allowed="TensorRT 10.14 or later; a cache updated in place needs 10.15 or later",
        fix=f"pip install --upgrade {target}, or take --target onnxruntime",
    )


def _check_cache(side: _Side, plan: Plan) -> None:
    """Check that past and present of an in-place cache are one buffer, as the session binds it.

    Raises:
        InternalError: if the parser made something else of the graph's updates.
    """
    if not side.rewritten.in_place:
        return
    wanted = sum(is_op(node, SCATTER_OP) for node in side.rewritten.model.graph)
    updates = sum(layer.kind == layer_audit.CACHE_KIND for layer in plan.layers)
    if wanted != updates:
        raise InternalError(
            f"{side.label}: the network has {updates} in-place cache updates where the graph has "
            f"{wanted}."
        )


def input_axes(model: ir.Model) -> dict[str, tuple[int | str | None, ...]]:
    """List the axes of each graph input: a size, or our name of the axis."""
    return {
        str(value.name): tuple(
            size if isinstance(size, int) else size.value for size in value.shape or ()
        )
        for value in model.graph.inputs
    }


def sparse_nodes(model: ir.Model) -> list[str]:
    """List the nodes of our domain."""
    domain = op_contract().domain
    return [str(node.name) for node in model.graph if node.domain == domain]


def inspect(target: TensorRTTarget, plan: bytes) -> str | None:
    """Return the inspector's JSON on a plan; None where it cannot be opened here."""
    if not tensorrt_library.gpu_is_usable():
        return None
    trt = tensorrt_library.load(target)
    engine = trt.Runtime(tensorrt_library.logger_of(target)).deserialize_cuda_engine(plan)
    if engine is None:  # for another GPU than the one here
        return None
    information: str = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    return information


def _announcement(target: TensorRTTarget, recipe: Recipe, weights: int) -> str:
    element = 4 if recipe.model.dtype == "float32" else 2
    capabilities = recipe.engine.compute_capabilities
    seconds = _SECONDS + _SECONDS_PER_PARAMETER * weights / element
    devices = ", ".join(capabilities) or "the GPU here"
    return (
        f"engine: {target} for {devices}, sparse and dense, about {duration(2 * seconds)} and "
        f"{_COPIES * weights / 1e9:.1f} GB of memory"
    )
