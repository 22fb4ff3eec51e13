"""Mitigations: cheap corrections of the error that masking causes, and which go together."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from nmexport.errors import RecipeError
from nmexport.sparsity.parts import PARTS, Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Corrects = Literal["shift", "variance", "scale", "gain", "bias", "compensation", "remainder"]


@dataclass(frozen=True)
class Mitigation:
    """One correction, described by what it asks of calibration, folding and the op."""

    name: str
    corrects: Corrects
    """A shift of the input before selection, the variance lost by it, and so on. One of each."""
    per_token: bool = False
    """Computed from the token at run time (an attribute of the op), else a calibrated constant."""
    learns: Part | None = None
    """The part of `nmexport.sparsity.learned` that is learned for it; None is calibrated."""
    changes_weight: bool = False
    """It goes into the folded weight, and no phase can stay dense."""


MITIGATIONS: Mapping[str, Mitigation] = MappingProxyType(
    {
        mitigation.name: mitigation
        for mitigation in (
            Mitigation("d-pts", corrects="shift", per_token=True),
            Mitigation("s-pts", corrects="shift"),
            Mitigation("l-pts", corrects="shift", learns="shift"),
            Mitigation("var", corrects="variance", per_token=True),
            Mitigation("s-var", corrects="variance"),
            Mitigation("ls", corrects="scale", learns="input_scale"),
            Mitigation("gain", corrects="gain", learns="output_scale", changes_weight=True),
            Mitigation("bias", corrects="bias", learns="bias"),
            Mitigation("low-rank", corrects="compensation", learns="low_rank", changes_weight=True),
            Mitigation("r-sparse", corrects="remainder", changes_weight=True),
        )
    }
)


def check_combination(mitigations: Sequence[str], phases: str) -> None:
    """Refuse what cannot be computed together.

    Args:
        mitigations: Names among MITIGATIONS; none is the empty sequence.
        phases: `all`, `prefill` or `decode`.

    Raises:
        RecipeError: for an unknown name, one twice, two shifts, two variance corrections, a
            mitigation that changes W where a phase stays dense, or `r-sparse` beside learned ones.
    """
    for name in mitigations:
        if name not in MITIGATIONS:
            raise RecipeError(
                f"Unknown mitigation {name!r}.", allowed=", ".join(["none", *MITIGATIONS])
            )
    for name in mitigations:
        if mitigations.count(name) > 1:
            raise RecipeError(f"Mitigation {name} is named twice.", fix=f"name {name} once")
    _at_most_one(mitigations, "shift", "shift before selection")
    _at_most_one(mitigations, "variance", "variance correction")
    _remainder_alone(mitigations)
    _dense_phase_possible(mitigations, phases)


def check_allocatable(mitigations: Sequence[str]) -> None:
    """Refuse what no budget can be held with.

    Raises:
        RecipeError: for `r-sparse`: its product meets every channel, so that neither the trials of
            an allocation nor its count of bytes would be those of what is built.
    """
    if "r-sparse" in mitigations:
        raise RecipeError(
            "Mitigation r-sparse cannot be used with --budget: an allocation tries linears on "
            "sparse inputs and counts the rows that are kept, and r-sparse adds a product of all "
            "channels that it neither tries nor counts.",
            allowed="r-sparse with one --pattern for all linears; under a budget, any other",
            fix="drop --budget, or use low-rank, which costs nothing at run time",
        )


def learned_parts(mitigations: Sequence[str]) -> tuple[Part, ...]:
    """List the parts to learn for these mitigations, in the order that learning names them."""
    wanted = {MITIGATIONS[name].learns for name in mitigations}
    return tuple(part for part in PARTS if part in wanted)


def uses(mitigations: Sequence[str], corrects: Corrects, *, per_token: bool) -> bool:
    """Tell whether a mitigation of this kind is among the names."""
    chosen = [MITIGATIONS[name] for name in mitigations]
    return any(
        mitigation.corrects == corrects and mitigation.per_token == per_token
        for mitigation in chosen
    )


def _at_most_one(mitigations: Sequence[str], corrects: Corrects, words: str) -> None:
    given = [name for name in mitigations if MITIGATIONS[name].corrects == corrects]
    if len(given) > 1:
        one_of = [
            mitigation.name
            for mitigation in MITIGATIONS.values()
            if mitigation.corrects == corrects
        ]
        raise RecipeError(
            f"Mitigations {' and '.join(given)} cannot be combined: an op has one {words}.",
            allowed=f"at most one of {', '.join(one_of)}",
        )


def _remainder_alone(mitigations: Sequence[str]) -> None:
    learned = [name for name in mitigations if MITIGATIONS[name].learns]
    if "r-sparse" in mitigations and learned:
        raise RecipeError(
            f"Mitigations r-sparse and {learned[0]} cannot be combined: constants are learned for "
            "what the kept channels alone compute, and r-sparse adds a product of all channels.",
            allowed="r-sparse with d-pts, s-pts, var or s-var",
            fix=f"drop {', '.join(learned)}, or use low-rank, which costs nothing at run time",
        )


def _dense_phase_possible(mitigations: Sequence[str], phases: str) -> None:
    given = [name for name in mitigations if MITIGATIONS[name].changes_weight]
    if given and phases != "all":
        other = "decode" if phases == "prefill" else "prefill"
        raise RecipeError(
            f"Mitigation {given[0]} cannot be used with phases {phases}: it changes the folded "
            f"weight, and {other}, which stays dense, needs it as it is.",
            allowed=f"{given[0]} with --phases all; with {phases}, "
            + ", ".join(name for name, each in MITIGATIONS.items() if not each.changes_weight),
            fix=f"drop {', '.join(given)}, or use --phases all",
        )
