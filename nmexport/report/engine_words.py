"""The report's `engine`: what TensorRT made of the model, and in words what a reader must know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.report.figures import size
from nmexport.report.model import EngineFacts

if TYPE_CHECKING:
    from nmexport.runtimes.engine import Engine

_LAYOUTS = 1.25
"""A plan so much larger than its weights holds some of them in two layouts."""
_SMALL = 64_000_000  # bytes that graphs and kernels take anyway


def section(engine: Engine) -> EngineFacts | None:
    """Describe a TensorRT build; None where ONNX Runtime runs the model."""
    described = engine.tensorrt
    if described is None or engine.build is None:
        return None
    return EngineFacts(
        runtime=f"{engine.runtime} {engine.runtime_version}",
        compute_capabilities=tuple(described.compute_capabilities),
        attention=described.attention,
        cache="in place" if described.in_place_cache else "concatenated",
        why_not_in_place=described.why_not_in_place,
        **vars(engine.build),
    )


def words(engine: EngineFacts | None) -> list[str]:
    """Say how attention, cache and plans are built, which decides how much of the gain is left."""
    if engine is None:
        return []
    return [f"{engine.runtime}: {_attention(engine)} {_cache(engine)} {_plans(engine)}".strip()]


def _attention(engine: EngineFacts) -> str:
    layers = engine.attention_layers
    if engine.attention == "fused":
        kernels = ", ".join(f"{name} {count}" for name, count in engine.attention_kernels.items())
        return f"all {layers} attention layers run as fused kernels ({kernels})."
    if engine.attention == "elementary":
        return "attention runs as products and a softmax."
    return (
        f"{layers} attention layers were given to the runtime as such; whether each became one "
        "kernel cannot be read here."
    )


def _cache(engine: EngineFacts) -> str:
    if engine.cache == "in place":
        return "The KV cache is updated in place."
    return (
        f"The KV cache is copied to a longer one in every run ({engine.why_not_in_place}), on "
        "both sides alike."
    )


def _plans(engine: EngineFacts) -> str:
    weights = engine.weight_bytes
    larger = [
        f"the {side} plan takes {size(plan)} for {size(weights)} of weights"
        for side, plan in engine.plan_bytes.items()
        if plan > _LAYOUTS * weights and plan - weights > _SMALL
    ]
    if not larger:
        return ""
    words = " and ".join(larger)
    return f"{words[0].upper()}{words[1:]}: each profile may hold weights in a layout of its own."
