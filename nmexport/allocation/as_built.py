"""A choice as it was built: every constant folded, learned ones too, beside the dense model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nmexport.calibration.forward_passes import _forward, _hooked
from nmexport.sparsity.linear import FoldedLinear
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour


class BuiltLinear(nn.Module):
    """A linear as its artifact will have it, folded anew for every input: nothing is held twice."""

    def __init__(
        self,
        behaviour: Behaviour,
        folded: Callable[[], Mapping[str, torch.Tensor]],
        *,
        prompt: int = 0,
    ) -> None:
        """Fold when asked.

        Args:
            behaviour: Attributes of the op.
            folded: Makes its tensors, on any device.
            prompt: Tokens of each sequence that count as prefill, the rest as decoded one by one.
                Where the phase is `all` it makes no difference.
        """
        super().__init__()
        self._behaviour, self._folded, self._prompt = behaviour, folded, prompt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Whole sequences `[B, S, K]` -> `[B, S, O]`."""
        tensors = {name: one.to(x.device) for name, one in self._folded().items()}
        phase, pattern = self._behaviour.phase, self._behaviour.pattern
        sparse = FoldedLinear.from_tensors(replace(self._behaviour, phase="all"), tensors)
        if phase == "all":
            y: torch.Tensor = sparse(x)
            return y
        all_kept = replace(self._behaviour, phase="all", pattern=NMPattern(pattern.m, pattern.m))
        dense = FoldedLinear.from_tensors(all_kept, tensors)
        first, then = (sparse, dense) if phase == "prefill" else (dense, sparse)
        return torch.cat([first(x[:, : self._prompt]), then(x[:, self._prompt :])], dim=1)


def errors_as_built(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    built: Mapping[str, BuiltLinear],
    windows: torch.Tensor,
    *,
    progress: Progress,
) -> dict[str, float | None]:
    """`||y_built - y_dense|| / ||y_dense||` of each linear alone, on the dense model's inputs.

    Args:
        model: The dense model.
        linears: Its linears that were built, by name.
        built: The same, as built in all phases alike.
        windows: `[W, L]` int64 token ids.
        progress: Counts windows.

    Returns:
        By name; None where the dense output is zero.
    """
    lost, whole = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0)

    def watch(name: str, linear: nn.Linear) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            lost[name] += _squares(built[name](arguments[0]) - output)
            whole[name] += _squares(output)

        return linear.register_forward_hook(hook)

    with _hooked(watch(*one) for one in linears.items()):
        for window in progress.track(windows, label="fold: errors as built", total=len(windows)):
            _forward(model, window)
    return {name: (lost[name] / whole[name]) ** 0.5 if whole[name] else None for name in linears}


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
