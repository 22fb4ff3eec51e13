"""Whether an engine is what was asked for: one plugin layer per sparse node, no weight twice.

Three witnesses, as good as the machine allows: the parsed network, always; TensorRT's inspector,
which needs the GPU that the engine is for; and else the execution graph that a TensorRT-RTX plan
carries as text, which is its own format and may change: where it cannot be read, that is said.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nmexport.engines.building import NetworkLayer

PLUGIN_KIND = "PLUGIN_V3"
CACHE_KIND = "KV_CACHE_UPDATE"
ATTENTION_KIND = "ATTENTION_INPUT"
DUPLICATE_SLACK = 1.10
"""A plan may be this much larger than its weights and the kernels in it before a copy is suspected:
constants that were folded, and tables that were made of them."""
_KERNEL_BYTES = 32_000_000  # compiled kernels, graphs and names of a plan, generously
_PROFILE_SUFFIX = re.compile(r" \[profile (\d+)\]$")
_PLAN_LAYER = re.compile(rb'custom_layer=\{ name="([^"]+)"')


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """What was found; `layers.json`."""

    source: Literal["inspector", "plan", "network"]
    why: str | None
    """Why no better witness was heard."""
    sparse_nodes: int
    """Sparse nodes of the graph."""
    plugin_layers: Mapping[str, int]
    """Plugin layers of each profile, by its number; of the network alone under `network`."""
    attention_layers: int
    """Fused attention layers of the network."""
    cache_updates: int
    """In-place cache updates of the network."""
    plan_bytes: int
    weight_bytes: int
    """Of the graph's initializers, each counted once."""
    layers: tuple[Any, ...]
    """Names, or the inspector's own records."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"schema": 1, **asdict(self)}


def audit(
    *,
    network: Sequence[NetworkLayer],
    plan: bytes,
    inspector: str | None,
    nodes: Iterable[str],
    weight_bytes: int,
    plugin_bytes: int = 0,
    devices: int = 1,
) -> LayerAudit:
    """Check an engine.

    Args:
        network: Layers of the parsed network.
        plan: The plan's bytes.
        inspector: The inspector's JSON; None where the engine cannot be opened here.
        nodes: Names of the graph's sparse nodes.
        weight_bytes: Bytes of the graph's initializers.
        plugin_bytes: Bytes of the plugin library where the plan embeds it.
        devices: Kinds of GPU that the plan is for: each has an engine in it.

    Raises:
        InternalError: if a sparse node has no plugin layer or several, or weights are in the plan
            more than once.
    """
    wanted = Counter(nodes)
    _compare("network", wanted, Counter(x.name for x in network if x.kind == PLUGIN_KIND))
    found, source, why = _witness(plan, inspector)
    for profile, names in found.items():
        _compare(f"{source}, profile {profile}", wanted, Counter(names))
    allowed = devices * (int(weight_bytes * DUPLICATE_SLACK) + _KERNEL_BYTES) + plugin_bytes
    if len(plan) > allowed:
        raise InternalError(
            f"The plan has {len(plan)} bytes for {weight_bytes} bytes of weights: some are in it "
            f"more than once (allowed: {allowed})."
        )
    kinds = Counter(layer.kind for layer in network)
    return LayerAudit(
        source=source,
        why=why,
        sparse_nodes=wanted.total(),
        plugin_layers={profile: len(names) for profile, names in found.items()}
        or {"network": wanted.total()},
        attention_layers=kinds[ATTENTION_KIND],
        cache_updates=kinds[CACHE_KIND],
        plan_bytes=len(plan),
        weight_bytes=weight_bytes,
        layers=tuple(json.loads(inspector)["Layers"])
        if inspector is not None
        else tuple({"name": layer.name, "kind": layer.kind} for layer in network),
    )


def _witness(
    plan: bytes, inspector: str | None
) -> tuple[dict[str, list[str]], Literal["inspector", "plan", "network"], str | None]:
    if inspector is not None:
        return inspected_plugin_layers(inspector), "inspector", None
    no_gpu = "the inspector needs the GPU that the engine is for"
    found = planned_plugin_layers(plan)
    if found:
        return found, "plan", no_gpu
    return {}, "network", f"{no_gpu}, and the plan holds no execution graph that can be read"


def planned_plugin_layers(plan: bytes) -> dict[str, list[str]]:
    """Plugin layers by profile, from the text in a TensorRT-RTX plan; empty where there is none."""
    names = [name.decode(errors="replace") for name in _PLAN_LAYER.findall(plan)]
    return _by_profile(names)


def inspected_plugin_layers(document: str) -> dict[str, list[str]]:
    """Plugin layers by profile, from the inspector's JSON."""
    layers = json.loads(document)["Layers"]
    names = [
        str(layer["Name"])
        for layer in layers
        if isinstance(layer, dict) and str(layer.get("LayerType", "")).startswith("Plugin")
    ]
    return _by_profile(names)


def _by_profile(names: Iterable[str]) -> dict[str, list[str]]:
    profiles: dict[str, list[str]] = {}
    for name in names:
        suffix = _PROFILE_SUFFIX.search(name)
        number = suffix.group(1) if suffix else "0"
        profiles.setdefault(number, []).append(_PROFILE_SUFFIX.sub("", name))
    return profiles


def _compare(where: str, wanted: Counter[str], found: Counter[str]) -> None:
    missing, extra = wanted - found, found - wanted
    if missing or extra:
        raise InternalError(
            f"The engine ({where}) has {found.total()} plugin layers for {wanted.total()} sparse "
            f"nodes: missing {_some(missing)}; beyond them {_some(extra)}."
        )


def _some(names: Counter[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"  # noqa: PLR2004
