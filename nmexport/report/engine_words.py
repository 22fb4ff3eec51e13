"""The report's `engine`: what TensorRT made of the model, and in words what a reader must know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.report.pages import size
from nmexport.store.records import json_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.runtimes.engine import Engine

_LAYOUTS = 1.25
"""A plan so much larger than its weights holds some of them in two layouts."""
_SMALL = 64_000_000  # bytes that graphs and kernels take anyway


def section(engine: Engine) -> dict[str, Any] | None:
    """Describe a TensorRT build; None where ONNX Runtime runs the model."""
    described = engine.tensorrt
    if described is None or engine.build is None:
        return None
    return {
        "runtime": f"{engine.runtime} {engine.runtime_version}",
        "compute_capabilities": list(described.compute_capabilities),
        "attention": described.attention,
        "cache": "in place" if described.in_place_cache else "concatenated",
        "why_not_in_place": described.why_not_in_place,
        **json_from(engine.build),
    }


def words(found: Mapping[str, Any] | None) -> list[str]:
    """Sentences on attention, cache and plans, which decide how much of the gain is left."""
    if found is None:
        return []
    return [f"{found['runtime']}: {_attention(found)} {_cache(found)} {_plans(found)}".strip()]


def _attention(found: Mapping[str, Any]) -> str:
    layers = found["attention_layers"]
    if found["attention"] == "fused":
        kernels = ", ".join(f"{name} {count}" for name, count in found["attention_kernels"].items())
        return f"all {layers} attention layers run as fused kernels ({kernels})."
    if found["attention"] == "elementary":
        return "attention runs as products and a softmax."
    return (
        f"{layers} attention layers were given to the runtime as such; whether each became one "
        "kernel cannot be read here."
    )


def _cache(found: Mapping[str, Any]) -> str:
    if found["cache"] == "in place":
        return "The KV cache is updated in place."
    return (
        f"The KV cache is copied to a longer one in every run ({found['why_not_in_place']}), on "
        "both sides alike."
    )


def _plans(found: Mapping[str, Any]) -> str:
    weights = found["weight_bytes"]
    larger = [
        f"the {side} plan takes {size(plan)} for {size(weights)} of weights"
        for side, plan in found["plan_bytes"].items()
        if plan > _LAYOUTS * weights and plan - weights > _SMALL
    ]
    if not larger:
        return ""
    told = " and ".join(larger)
    return f"{told[0].upper()}{told[1:]}: each profile may hold weights in a layout of its own."
