"""Input sites: linears that read the same tensor, such as q, k and v, or gate and up.

They share one choice and the constants of the input side, so that they can be run as one op.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.forward_passes import hooked, run_samples
from nmexport.progress import Silent
from nmexport.sparsity.targets import _decoder_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.models.layerwise import LayerwiseModel

_TOKENS = 8  # enough for every linear to be called; their inputs are all held meanwhile


@dataclass(frozen=True)
class Site:
    """Linears that read one tensor, in model order."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    layer: int
    """Decoder layer that the tensor arises in; 0 also for what lies outside of the decoder."""

    @property
    def weights(self) -> int:
        """Elements of all weights."""
        return self.in_features * sum(self.out_features)


def input_sites(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    sample: torch.Tensor,
    *,
    layerwise: LayerwiseModel | None = None,
) -> list[Site]:
    """Run the model once and see which linears read the same tensor.

    Args:
        model: A Hugging Face causal language model in evaluation mode.
        linears: Its linears, by name, in model order.
        sample: `[length]` int64 token ids.
        layerwise: Runs the model with one layer in memory at a time; None runs it whole.

    Returns:
        Sites in model order; a linear that no token reaches has one of its own.
    """
    inputs: dict[str, torch.Tensor] = {}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            del module
            # Held, so that no later tensor can take its place in memory and look the same.
            inputs.setdefault(name, arguments[0])

        return linear.register_forward_pre_hook(hook)

    with hooked(watch(*item) for item in linears.items()):
        run_samples(
            model, sample[None, :_TOKENS], progress=Silent(), label="sites", layerwise=layerwise
        )
    groups: dict[int, list[str]] = {}
    for place, name in enumerate(linears):
        groups.setdefault(id(inputs[name]) if name in inputs else -1 - place, []).append(name)
    return [_site(model, names, linears) for names in groups.values()]


def concatenated_weight(site: Site, linears: Mapping[str, nn.Linear]) -> torch.Tensor:
    """Concatenate the site's weights as one linear: `[sum of O, K]`."""
    return torch.cat([linears[name].weight.detach() for name in site.names])


def _site(model: nn.Module, names: list[str], linears: Mapping[str, nn.Linear]) -> Site:
    chosen = [linears[name] for name in names]
    return Site(
        names=tuple(names),
        in_features=chosen[0].in_features,
        out_features=tuple(linear.out_features for linear in chosen),
        layer=_layer_of(model, names[0]),
    )


def _layer_of(model: nn.Module, name: str) -> int:
    stack, _ = _decoder_layers(model)
    rest = name.removeprefix(f"{stack}.").partition(".")[0]
    return int(rest) if name.startswith(f"{stack}.") and rest.isdigit() else 0
