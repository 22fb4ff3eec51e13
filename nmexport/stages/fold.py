"""Fold: every constant of the method moved into the weights, biases and inputs of the op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.layers import LayerSpec, read_layers, write_layers
from nmexport.sparsity.mitigation import check_combination
from nmexport.stages import calibrate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import nn

    from nmexport.calibration.local_error import ErrorObserver
    from nmexport.recipe import Recipe
    from nmexport.sparsity.linear import Behaviour, Constants
    from nmexport.sparsity.statistics import ChannelStatistics
    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ("calibrate",)
# Local errors and the static variance correction need few tokens: one number a layer.
ERROR_SAMPLES = 4
TENSORS = ("W", "bias", "shift", "shift_weight", "score_scale", "channel_order")


@dataclass(frozen=True)
class Artifact:
    """A finished fold."""

    path: Path

    @property
    def layers(self) -> list[LayerSpec]:
        """The sparsified linears, in model order."""
        return read_layers(self.path)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of one linear by their name in the op contract: `W`, and those it uses.

        Raises:
            ArtifactError: if the file is damaged, or does not hold this linear.
        """
        from nmexport.tensors import TensorReader

        reader = TensorReader(self.path)
        held = set(reader.names)
        return {
            kind: reader.read(f"{name}.{kind}")
            for kind in TENSORS
            if kind == "W" or f"{name}.{kind}" in held
        }


def key_fields(inputs: StageInputs) -> dict[str, Any]:
    """What the linears compute, and in which type.

    Raises:
        RecipeError: if the mitigations do not go together: said before anything runs.
    """
    recipe = inputs.recipe
    check_combination(recipe.sparsity.mitigations, recipe.sparsity.phases)
    return {
        "model": inputs.source.digest,
        "dtype": recipe.model.dtype,
        "sparsity": recipe.sparsity.model_dump(mode="json"),
        "seed": recipe.seed,
        "error_samples": ERROR_SAMPLES,
    }


def run(inputs: StageInputs) -> dict[str, Any]:
    """Derive the constants of every target, measure what selection costs it, fold, write.

    Raises:
        TargetError: if the recipe's targets select nothing.
        PatternError: if the pattern does not fit a target.
        ModelError: if calibration never reached a target, or a folded weight leaves the type.
    """
    import torch

    from nmexport.calibration.passes import gather_errors, on_best_device
    from nmexport.models.loader import load_model
    from nmexport.sparsity.linear import fold
    from nmexport.sparsity.method import behaviour_of
    from nmexport.sparsity.targets import linears_of, select_targets
    from nmexport.tensors import ShardedWriter

    recipe = inputs.recipe
    calibrated = calibrate.Artifact(inputs.upstream["calibrate"])
    model = load_model(
        inputs.source, dtype=torch.float32, trust_remote_code=recipe.model.trust_remote_code
    )
    behaviour = behaviour_of(recipe.sparsity)
    targets = select_targets(model, recipe.sparsity.targets, recipe.sparsity.pattern)
    linears = {name: linear for name, linear in linears_of(model).items() if name in set(targets)}
    constants = _constants(recipe, linears, calibrated.statistics())
    samples = calibrated.samples()[:ERROR_SAMPLES]
    errors = gather_errors(
        on_best_device(model), linears, constants, behaviour, samples, progress=inputs.progress
    )
    model.to("cpu")  # folding is the same everywhere
    constants = _with_static_variance(recipe, constants, errors)

    dtype = getattr(torch, recipe.model.dtype)
    with ShardedWriter(inputs.output) as writer:
        for name in inputs.progress.track(targets, label="fold: weights", total=len(targets)):
            folded = fold(linears[name], behaviour, constants[name], dtype=dtype)
            _check_finite(name, folded, recipe.model.dtype)
            writer.add({f"{name}.{kind}": tensor for kind, tensor in folded.items()})
    specs = [
        _layer_spec(
            recipe,
            name,
            linears[name],
            behaviour=behaviour,
            nu=constants[name].nu,
            error=errors[name],
        )
        for name in targets
    ]
    write_layers(inputs.output, specs)
    return {"linears": len(specs), "relative_error_mean": _mean_error(specs)}


def _constants(
    recipe: Recipe,
    linears: Mapping[str, nn.Linear],
    statistics: Mapping[str, ChannelStatistics],
) -> dict[str, Constants]:
    from nmexport.sparsity.method import constants_of

    unreached = [name for name in linears if name not in statistics]
    if unreached:
        raise ModelError(
            f"No calibration token reached {unreached[0]} ({len(unreached)} such linears).",
            fix="calibrate on more samples, or exclude these linears with --targets",
        )
    return {
        name: constants_of(recipe.sparsity, linear.weight, statistics[name], seed=recipe.seed)
        for name, linear in linears.items()
    }


def _with_static_variance(
    recipe: Recipe, constants: dict[str, Constants], errors: Mapping[str, ErrorObserver]
) -> dict[str, Constants]:
    from nmexport.sparsity.method import needs_static_variance

    if not needs_static_variance(recipe.sparsity):
        return constants
    return {name: replace(one, nu=errors[name].static_nu()) for name, one in constants.items()}


def _check_finite(name: str, folded: Mapping[str, torch.Tensor], dtype: str) -> None:
    for kind, tensor in folded.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{kind} of {name} is not finite in {dtype} once folded.",
                fix="use --dtype bfloat16 or float32"
                if dtype == "float16"
                else "check the weights",
            )


def _layer_spec(
    recipe: Recipe,
    name: str,
    linear: nn.Linear,
    *,
    behaviour: Behaviour,
    nu: float | None,
    error: ErrorObserver,
) -> LayerSpec:
    from nmexport.sparsity.linear import bias_of

    section = recipe.sparsity
    relative = error.relative_error(1.0 if nu is None else nu)
    return LayerSpec(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        pattern=str(section.pattern),
        criterion=section.criterion,
        mitigations=section.mitigations,
        grouping=section.grouping,
        phase=section.phases,
        dynamic_shift=behaviour.dynamic_shift,
        variance_correction=behaviour.variance_correction,
        has_bias=bias_of(linear) is not None,
        # Six digits: what follows is the summation order of the machine.
        relative_error=None if relative is None else float(f"{relative:.6g}"),
    )


def _mean_error(specs: list[LayerSpec]) -> float | None:
    known = [spec.relative_error for spec in specs if spec.relative_error is not None]
    return sum(known) / len(known) if known else None
