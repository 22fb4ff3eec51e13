"""Learnable stand-ins for a model's linears: what learning changes, whatever it minimises."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nmexport.calibration.forward_passes import hooked
from nmexport.calibration.learning_chunks import SEED_STRIDE
from nmexport.errors import ModelError
from nmexport.sparsity.learned import LearnedLinear, LearningSite, Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from nmexport.calibration.effort import LearningSettings
    from nmexport.sparsity.fold import Corrections
    from nmexport.sparsity.linear import Behaviour, Constants

_BETAS = (0.9, 0.99)
_WARMUP = 5


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Linears to sparsify and their calibrated constants: where learning starts."""

    linears: Mapping[str, nn.Linear]
    """By name, in model order."""
    constants: Mapping[str, Constants]
    behaviours: Mapping[str, Behaviour]
    sites: Sequence[Sequence[str]] = ()
    """Names of linears that share an input: they learn one shift, and one input scale where a phase
    stays dense. A linear that is in none is alone."""

    def within(self, module: str) -> Targets:
        """Keep those inside a module."""
        inside = {
            name: linear for name, linear in self.linears.items() if name.startswith(f"{module}.")
        }
        return Targets(
            linears=inside,
            constants=self.constants,
            behaviours=self.behaviours,
            sites=[names for names in self.sites if any(name in inside for name in names)],
        )


class Students:
    """Stand-ins by name, those of one site on one selection; each computes sparse or dense."""

    def __init__(
        self,
        targets: Targets,
        spreads: Mapping[str, Spread],
        *,
        settings: LearningSettings,
        dtype: torch.dtype,
        first: int = 0,
    ) -> None:
        """Start at the calibrated constants.

        Args:
            targets: What to stand in for.
            spreads: Sizes of each linear's input and output.
            settings: Parts, rank, seed.
            dtype: Type of the products.
            first: How many linears of the model come before: seeds differ by place.
        """
        site_of = _learning_sites(targets, spreads, learns_shift="shift" in settings.parts)
        self.by_name = {
            name: LearnedLinear(
                linear,
                targets.behaviours[name],
                targets.constants[name],
                spread=spreads[name],
                parts=settings.parts,
                site=site_of.get(name),
                rank=settings.rank,
                seed=settings.seed * SEED_STRIDE + first + place,
                dtype=dtype,
            )
            for place, (name, linear) in enumerate(targets.linears.items())
        }
        self._settings = settings
        self._sites: dict[LearningSite, str] = {}
        for name, student in self.by_name.items():
            self._sites.setdefault(student.site, name)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the learned parameters by name; a site's own once, under its first linear."""
        parameters: dict[str, nn.Parameter] = {}
        for name, student in self.by_name.items():
            is_first = self._sites[student.site] == name
            if student.site.learns_shift and is_first:
                parameters[f"{name}.shift"] = student.site.shift
            for part, value in student.learned.items():
                if is_first or value is not student.site.input_scale:
                    parameters[f"{name}.{part}"] = value
        return parameters

    def values(self) -> dict[str, torch.Tensor]:
        """Return all parameters by name, on the CPU, for a checkpoint."""
        return {name: value.detach().cpu() for name, value in self.parameters().items()}

    def restore(self, values: Mapping[str, torch.Tensor]) -> None:
        """Restore what `values` returned."""
        for name, parameter in self.parameters().items():
            parameter.data.copy_(values[name])

    def corrections(self) -> dict[str, Corrections]:
        """Return what has been learned so far, by linear, on the CPU."""
        return {name: student.corrections() for name, student in self.by_name.items()}

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Make all of them compute the dense linear."""
        for student in self.by_name.values():
            student.sparse = False
        try:
            yield
        finally:
            for student in self.by_name.values():
                student.sparse = True

    @contextlib.contextmanager
    def disturbed(self, step: int) -> Iterator[None]:
        """Multiply the scores of all sites by the step's factors."""
        generator = torch.Generator().manual_seed(self._settings.seed * SEED_STRIDE + step)
        for site in self._sites:
            drawn = torch.randn(site.channels, generator=generator)
            site.disturbance = (self._settings.disturbance * drawn).exp().to(site.shift.device)
        try:
            yield
        finally:
            for site in self._sites:
                site.disturbance = None


def _learning_sites(
    targets: Targets, spreads: Mapping[str, Spread], *, learns_shift: bool
) -> dict[str, LearningSite]:
    """Map each linear that shares its input to its site."""
    site_of: dict[str, LearningSite] = {}
    for names in targets.sites:
        members = [name for name in names if name in targets.linears]
        for name in members:
            site_of[name] = site_of.get(members[0]) or LearningSite(
                targets.behaviours[name],
                targets.constants[name],
                input_rms=spreads[name].input_rms,
                members=len(members),
                learns_shift=learns_shift,
                device=targets.linears[name].weight.device,
            )
    return site_of


def rate_at(step: int, *, steps: int, rate: float) -> float:
    """Return the learning rate of a step: warm-up, then a cosine."""
    warm = min((step + 1) / _WARMUP, 1.0)
    return rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


class Optimiser:
    """Adam over named parameters, whose state can be saved."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, steps: int, rate: float) -> None:
        """Begin.

        Args:
            parameters: By name.
            steps: How many there will be.
            rate: Largest step of a parameter of size 1.
        """
        self._parameters, self._steps, self._rate = parameters, steps, rate
        self._adam = torch.optim.Adam(parameters.values(), lr=rate, betas=_BETAS, foreach=True)

    def step(self, step: int, value: float, backward: Callable[[], None]) -> None:
        """Take a step.

        Args:
            step: From 0.
            value: Of the loss.
            backward: Adds the gradients.

        Raises:
            ModelError: if the loss is not finite.
        """
        if not math.isfinite(value):
            raise ModelError(
                f"Learning left the finite numbers in step {step + 1}.",
                fix="learn with --effort fast, or drop the learned mitigations",
            )
        for group in self._adam.param_groups:
            group["lr"] = rate_at(step, steps=self._steps, rate=self._rate)
        self._adam.zero_grad(set_to_none=True)
        backward()
        self._adam.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return parameters and state, for a checkpoint."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._adam.state[parameter]
            tensors[f"{name}:value"] = parameter.detach().cpu()
            tensors[f"{name}:mean"] = state["exp_avg"].cpu()
            tensors[f"{name}:square"] = state["exp_avg_sq"].cpu()
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor], done: int) -> None:
        """Restore a checkpoint taken after `done` steps."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensors[f"{name}:value"])
            self._adam.state[parameter] = {
                "step": torch.tensor(float(done)),
                "exp_avg": tensors[f"{name}:mean"].to(parameter.device),
                "exp_avg_sq": tensors[f"{name}:square"].to(parameter.device),
            }


def spreads_of(
    linears: Mapping[str, nn.Linear], forward: Callable[[], object]
) -> dict[str, Spread]:
    """Measure each linear's input and output; a linear that is not reached is absent.

    Args:
        linears: By name.
        forward: Runs the dense model, or what holds them.
    """
    spreads: dict[str, Spread] = {}

    def watch(name: str, linear: nn.Linear) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module
            spreads[name] = Spread(input_rms=_rms(arguments[0]), output_rms=_rms(output))

        return linear.register_forward_hook(hook)

    with hooked(watch(*item) for item in linears.items()), torch.no_grad():
        forward()
    return spreads


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    """Compute the root mean square of each channel: `[..., C]` -> `[C]` float32, on the CPU."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1]).double()
    return flat.square().mean(dim=0).sqrt().float().cpu()
