"""Starts the constants of a block by least squares, one input site after another."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from nmexport.calibration.closed_forms import (
    LARGEST_INPUT,
    Moments,
    compensation,
    gain_and_bias,
)
from nmexport.calibration.forward_passes import hooked
from nmexport.calibration.learning_chunks import SEED_STRIDE
from nmexport.models.blocks import EnoughSeen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from nmexport.calibration.effort import LearningSettings
    from nmexport.calibration.students import Students
    from nmexport.models.blocks import Block
    from nmexport.sparsity.learned import LearnedLinear

    Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


def start_by_least_squares(
    block: Block, students: Students, batches: Batches, *, settings: LearningSettings
) -> None:
    """Set gain, bias and compensation of the block's linears to the best ones, site by site.

    A site sees what those before it have become. One whose linears take part of the tokens each,
    such as an expert's, is left alone, for the streams choose other tokens; so is one with a shift
    per token.

    Args:
        block: With the students in place.
        students: Set.
        batches: Gives the inputs of the block in both streams, `[B, L, H]` each, once more for each
            site.
        settings: Parts, rank, seed.
    """
    for names in students.site_names():
        members = {name: students.by_name[name] for name in names}
        if _is_open(members, settings):
            moments = _moments(block, students, members, batches)
            if moments is not None:
                for name, student in members.items():
                    _start(student, moments, name, settings)


def _is_open(members: Mapping[str, LearnedLinear], settings: LearningSettings) -> bool:
    """Tell whether anything of a site has a closed form, and memory for it."""
    first = next(iter(members.values()))
    parts = {"output_scale", "bias", "low_rank"}.intersection(settings.parts)
    fits = first.in_features <= LARGEST_INPUT
    return bool(parts) and fits and not first.behaviour.dynamic_shift


def _moments(
    block: Block,
    students: Students,
    members: Mapping[str, LearnedLinear],
    batches: Batches,
) -> Moments | None:
    """Sums over all batches; None where a linear is given some of the tokens alone."""
    first = next(iter(members.values()))
    moments = Moments.empty(
        first.in_features, {name: student.out_features for name, student in members.items()}
    )
    for dense, sparse in batches():
        with students.dense():
            outputs = _outputs(block, members, dense)
        kept = _kept(block, first, sparse)
        tokens = dense.shape[0] * dense.shape[1]
        if kept is None or len(kept) != tokens or len(outputs) != len(members):
            return None
        if any(len(output) != tokens for output in outputs.values()):
            return None
        moments.add(kept, outputs)
    return moments


def _outputs(
    block: Block, members: Mapping[str, LearnedLinear], hidden: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the linears give, `[T, O]` by name, of those that are reached."""
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str, student: LearnedLinear) -> RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            del module, arguments
            outputs[name] = output.reshape(-1, output.shape[-1])
            if len(outputs) == len(members):
                raise EnoughSeen

        return student.register_forward_hook(hook)

    with hooked(watch(*item) for item in members.items()), contextlib.suppress(EnoughSeen):
        block(hidden)
    return outputs


def _kept(block: Block, student: LearnedLinear, hidden: torch.Tensor) -> torch.Tensor | None:
    """What a site keeps, `[T, K]`; None where it is not reached."""
    found: list[torch.Tensor] = []

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        found.append(student.site.kept(arguments[0]))
        raise EnoughSeen

    with hooked(iter([student.register_forward_pre_hook(hook)])), contextlib.suppress(EnoughSeen):
        block(hidden)
    return found[0] if found else None


def _start(student: LearnedLinear, moments: Moments, name: str, settings: LearningSettings) -> None:
    """Set what has a closed form."""
    parts = student.learned.keys()
    weight = student.as_affine()
    gain, bias = gain_and_bias(
        moments, name, weight, gains="output_scale" in parts, biases="bias" in parts
    )
    if "output_scale" in parts:
        student.start_at(gain=gain)
    if "bias" in parts:
        # All of what is added to a token was scaled; the linear's own bias is outside of the gain.
        student.start_at(bias=gain * weight[-1] + bias - student.as_affine()[-1])
    if "low_rank_in" in parts:
        seed = settings.seed * SEED_STRIDE
        rank = student.learned["low_rank_in"].shape[1]
        student.start_at(low_rank=compensation(moments, name, student.as_affine(), rank, seed=seed))
