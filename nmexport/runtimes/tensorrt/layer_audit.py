"""Check that an engine has one plugin layer per sparse node, and no weight twice.

Three witnesses, as good as the machine allows: the parsed network, always; TensorRT's inspector,
which needs the GPU that the engine is for; and else the execution graph that a TensorRT-RTX plan
carries as text, which is its own format and may change: where it cannot be read, that is said.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import InternalError
from nmexport.runtimes.tensorrt import weight_copies

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from nmexport.runtimes.tensorrt.building import NetworkLayer
    from nmexport.runtimes.tensorrt.weight_copies import Weight

SCHEMA = 1
PLUGIN_KIND = "PLUGIN_V3"
CACHE_KIND = "KV_CACHE_UPDATE"
ATTENTION_KIND = "ATTENTION_INPUT"
FUSED, AS_LAYERS, ELEMENTARY = "fused", "attention layers", "elementary"
# What a plan may hold apart from its weights, per network layer and profile. TensorRT-RTX 1.7 takes
# 4 to 7 kB there, for SmolLM2 as for tiny models, however many kinds of GPU a plan is for.
_LAYER_BYTES = 12_000
# TensorRT compiles its kernels when it builds, and puts them in; nobody measured how large.
_KERNEL_BYTES = 32_000_000
_FOLDED = 1.02  # weights, with constants folded from them
_PROFILE_SUFFIX = re.compile(r" \[profile (\d+)\]$")
_PLAN_LAYER = re.compile(rb'custom_layer=\{ name="([^"]+)"')
_PLAN_ATTENTION = re.compile(rb"function=\{ name=_*(\w*mha\w*) ")
_ATTENTION_NAME = re.compile(r"[a-z]+_mha(?:_v\d+)?|fmha\w*")


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """Result of the audit, written to `layers.json`."""

    source: Literal["inspector", "plan", "network"]
    why: str | None
    """Why no better witness was heard."""
    sparse_nodes: int
    """Sparse nodes of the graph."""
    plugin_layers: Mapping[str, int]
    """Plugin layers of each profile, by its number; of the network alone under `network`."""
    attention_layers: int
    """Attention layers of the network."""
    attention_kernels: Mapping[str, int]
    """Fused attention kernels that the built engine runs, by name; none where that cannot be read
    or there are none."""
    cache_updates: int
    """In-place cache updates of the network."""
    plan_bytes: int
    weight_bytes: int
    """Bytes of the graph's initializers, each counted once."""
    weights_found: int
    """Weights whose bytes stand in the plan, each once."""
    layers: tuple[Any, ...]
    """Names, or the inspector's own records."""

    @property
    def attention(self) -> str:
        """How attention is computed, as far as anybody can tell.

        `fused`: the engine has a fused kernel for every attention layer in every profile;
        `attention layers`: the runtime was given such layers, and what it made of them cannot be
        read; `elementary`: products and a softmax.
        """
        if self.attention_layers == 0:
            return ELEMENTARY
        wanted = self.attention_layers * len(self.plugin_layers)
        return FUSED if sum(self.attention_kernels.values()) >= wanted else AS_LAYERS


def audit(
    *,
    network: Sequence[NetworkLayer],
    plan: bytes,
    inspector: str | None,
    nodes: Iterable[str],
    weights: Sequence[Weight],
    profiles: int = 1,
    plugin_bytes: int = 0,
    compiled: bool = False,
) -> LayerAudit:
    """Check an engine.

    Args:
        network: Layers of the parsed network.
        plan: The plan's bytes.
        inspector: The inspector's JSON; None where the engine cannot be opened here.
        nodes: Names of the graph's sparse nodes.
        weights: The graph's initializers.
        profiles: Optimisation profiles that it was built with.
        plugin_bytes: Bytes of the plugin library where the plan embeds it.
        compiled: The plan carries compiled kernels: TensorRT's does, TensorRT-RTX's does not.

    Raises:
        InternalError: if a sparse node has no plugin layer or several, or weights are in the plan
            more than once.
    """
    wanted = Counter(nodes)
    _compare("network", wanted, Counter(x.name for x in network if x.kind == PLUGIN_KIND))
    layers, source, why = _witness(plan, inspector)
    for profile, names in layers.items():
        _compare(f"{source}, profile {profile}", wanted, Counter(names))
    counted = weight_copies.copies(plan, weights)
    _check_copies(counted)
    weight_bytes = sum(weight.size for weight in weights)
    overhead = plugin_bytes + profiles * len(network) * _LAYER_BYTES + compiled * _KERNEL_BYTES
    _check_size(len(plan), weight_bytes, int(weight_bytes * _FOLDED) + overhead)
    kinds = Counter(layer.kind for layer in network)
    return LayerAudit(
        source=source,
        why=why,
        sparse_nodes=wanted.total(),
        plugin_layers={profile: len(names) for profile, names in layers.items()}
        or {"network": wanted.total()},
        attention_layers=kinds[ATTENTION_KIND],
        attention_kernels=_attention_kernels(plan, inspector),
        cache_updates=kinds[CACHE_KIND],
        plan_bytes=len(plan),
        weight_bytes=weight_bytes,
        weights_found=sum(count == 1 for count in counted.values()),
        layers=tuple(json.loads(inspector)["Layers"])
        if inspector is not None
        else tuple({"name": layer.name, "kind": layer.kind} for layer in network),
    )


def _check_copies(counted: Mapping[str, int]) -> None:
    repeated = weight_copies.find_repeated(counted)
    if repeated:
        raise InternalError(
            f"The plan holds {len(repeated)} weights more than once: {_some(Counter(repeated))}."
        )


def _check_size(plan: int, weights: int, allowed: int) -> None:
    """Check the plan's size: it shows a large second copy, which may have another layout."""
    if plan > allowed:
        raise InternalError(
            f"The plan has {plan} bytes for {weights} bytes of weights: some are in it more than "
            f"once (allowed: {allowed})."
        )


def _attention_kernels(plan: bytes, inspector: str | None) -> dict[str, int]:
    if inspector is None:
        return dict(Counter(name.decode() for name in _PLAN_ATTENTION.findall(plan)))
    matches = (_ATTENTION_NAME.search(name) for name in _names(inspector))
    return dict(Counter(match.group() for match in matches if match))


def _witness(
    plan: bytes, inspector: str | None
) -> tuple[dict[str, list[str]], Literal["inspector", "plan", "network"], str | None]:
    if inspector is not None:
        return inspected_plugin_layers(inspector), "inspector", None
    no_gpu = "the inspector needs the GPU that the engine is for"
    layers = planned_plugin_layers(plan)
    if layers:
        return layers, "plan", no_gpu
    return {}, "network", f"{no_gpu}, and the plan holds no execution graph that can be read"


def planned_plugin_layers(plan: bytes) -> dict[str, list[str]]:
    """Read plugin layers by profile from the text in a TensorRT-RTX plan; empty without one."""
    names = [name.decode(errors="replace") for name in _PLAN_LAYER.findall(plan)]
    return _by_profile(names)


def inspected_plugin_layers(document: str) -> dict[str, list[str]]:
    """Read plugin layers by profile from the inspector's JSON."""
    return _by_profile(_names(document, kind="Plugin"))


def _names(document: str, *, kind: str = "") -> list[str]:
    """List the inspector's layers whose type has a prefix."""
    return [
        str(layer["Name"])
        for layer in json.loads(document)["Layers"]
        if isinstance(layer, dict) and str(layer.get("LayerType", "")).startswith(kind)
    ]


def _by_profile(names: Iterable[str]) -> dict[str, list[str]]:
    profiles: dict[str, list[str]] = {}
    for name in names:
        suffix = _PROFILE_SUFFIX.search(name)
        number = suffix.group(1) if suffix else "0"
        profiles.setdefault(number, []).append(_PROFILE_SUFFIX.sub("", name))
    return profiles


def _compare(where: str, wanted: Counter[str], actual: Counter[str]) -> None:
    missing, extra = wanted - actual, actual - wanted
    if missing or extra:
        raise InternalError(
            f"The engine ({where}) has {actual.total()} plugin layers for {wanted.total()} sparse "
            f"nodes: missing {_some(missing)}; beyond them {_some(extra)}."
        )


def _some(names: Counter[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"  # noqa: PLR2004
