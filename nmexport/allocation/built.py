"""A choice as built, learned constants and all: measured, and held to its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from nmexport.calibration.forward_passes import forward_sample, hooked
from nmexport.errors import RecipeError
from nmexport.sparsity.linear import SparseLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle

    from nmexport.progress import Progress
    from nmexport.sparsity.linear import Behaviour
    from nmexport.store.allocation import Allocation

Result = TypeVar("Result")

Again = Literal["never", "beyond", "always"]
"""When to choose again: where what was built exceeds the budget, or may take more of it as well."""

ATTEMPTS = 3
# What is built within this share of its budget is as good as what is built right on it.
_NEAR = 0.9
# Learning wins back more than nine tenths of a divergence only by the luck of few windows.
_MOST_RELIEF = 10.0


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
        tensors = {name: tensor.to(x.device) for name, tensor in self._folded().items()}
        y: torch.Tensor = SparseLinear(self._behaviour, tensors, prompt=self._prompt)(x)
        return y


def errors_as_built(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    built: Mapping[str, nn.Module],
    windows: torch.Tensor,
    *,
    progress: Progress,
    label: str = "fold: errors as built",
) -> dict[str, float | None]:
    """`||y_built - y_dense|| / ||y_dense||` of each linear alone, on the dense model's inputs.

    Args:
        model: The dense model.
        linears: Its linears that were built, by name.
        built: The same, as built in all phases alike.
        windows: `[W, L]` int64 token ids.
        progress: Counts windows.
        label: What is being done.

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

    with hooked(watch(*item) for item in linears.items()):
        for window in progress.track(windows, label=label, total=len(windows)):
            forward_sample(model, window)
    return {name: (lost[name] / whole[name]) ** 0.5 if whole[name] else None for name in linears}


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def built_within(
    choose: Callable[[float], Allocation],
    build: Callable[[Allocation, int], tuple[Result, Allocation]],
    *,
    again: Again,
) -> tuple[Result, Allocation]:
    """Choose, build, measure, and choose again: the fastest that keeps the budget as built.

    The first choice keeps the budget before it is built. The next may take as much more of it as
    learning won back from the one before, or as much less as building lost.

    Args:
        choose: Makes a choice, given what limits of accuracy are multiplied by.
        build: Builds a choice, given how many were built before; returns it with what it came to.
        again: When to choose again for the model as built.

    Raises:
        RecipeError: if no choice keeps the budget even before it is built.
    """
    made, best = build(choose(1.0), 0)
    last = best
    for attempt in range(1, ATTEMPTS):
        if again == "never" or (again == "beyond" and _budget_used(best) <= 1):
            break
        relief = _relief(last)
        chosen = None if relief is None else _choose_within(choose, relief)
        if chosen is None or chosen.choices in (best.choices, last.choices):
            break
        rebuilt, last = build(chosen, attempt)
        if _is_better(last, best):
            made, best = rebuilt, last
    return made, best


def _relief(built: Allocation) -> float | None:
    """Return how often the budget may be spent before building; None where this one is good."""
    before, after = built.budget_used, None if built.built is None else built.built.budget_used
    if before is None or after is None or _NEAR <= after <= 1:
        return None
    return min(before / max(after, before / _MOST_RELIEF), _MOST_RELIEF)


def _choose_within(choose: Callable[[float], Allocation], relief: float) -> Allocation | None:
    try:
        return choose(relief)
    except RecipeError:
        return None  # so little is left of the budget that only the dense model keeps it


def _is_better(first: Allocation, other: Allocation) -> bool:
    """Prefer a kept budget; then the faster, or the more accurate if both exceed it."""
    if _budget_used(first) <= 1 and _budget_used(other) <= 1:
        return first.decode_speedup > other.decode_speedup
    return _budget_used(first) < _budget_used(other)


def _budget_used(allocation: Allocation) -> float:
    used = None if allocation.built is None else allocation.built.budget_used
    return 0.0 if used is None else used
