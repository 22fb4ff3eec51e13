"""What each choice and each mitigation costs single linears, on the dense model's activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.calibration.forward_passes import _forward, _hooked
from nmexport.calibration.local_error import ErrorObserver, observe_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour, Constants


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way a linear could compute."""

    behaviour: Behaviour
    constants: Constants


def observe_variants(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    variants: Mapping[str, Mapping[str, Variant]],
    windows: torch.Tensor,
    *,
    progress: Progress,
    label: str,
) -> dict[str, dict[str, ErrorObserver]]:
    """Run the dense model once over the windows and try every variant on every linear's input.

    Args:
        model: The dense model.
        linears: Linears to watch, by name.
        variants: By linear, then by a name of the variant.
        windows: `[W, L]` int64 token ids.
        progress: Counts windows.
        label: What is being done.

    Returns:
        Observers by linear and variant.
    """
    seen = {name: {key: ErrorObserver() for key in variants[name]} for name in linears}

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            for key, one in variants[name].items():
                found = observe_error(linear, one.behaviour, one.constants, arguments[0], output)
                seen[name][key].merge(found)

        return linear.register_forward_hook(hook)

    with _hooked(watch(*one) for one in linears.items()):
        for window in progress.track(windows, label=label, total=len(windows)):
            _forward(model, window)
    return seen
