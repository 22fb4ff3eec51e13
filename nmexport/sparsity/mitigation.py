"""Mitigations: cheap corrections of the error that masking causes, and which go together."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from nmexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Corrects = Literal["shift", "variance"]


@dataclass(frozen=True)
class Mitigation:
    """One correction, described by what it asks of calibration, folding and the op."""

    name: str
    corrects: Corrects
    """A shift of the input before selection, or the variance lost by it. One of each at most."""
    per_token: bool
    """Computed from the token at run time (an attribute of the op), else a calibrated constant."""
    changes_weight: bool = False
    """The folded W is not the dense weight: then no phase can be left dense."""


MITIGATIONS: Mapping[str, Mitigation] = MappingProxyType(
    {
        mitigation.name: mitigation
        for mitigation in (
            Mitigation("d-pts", corrects="shift", per_token=True),
            Mitigation("s-pts", corrects="shift", per_token=False),
            Mitigation("var", corrects="variance", per_token=True),
            Mitigation("s-var", corrects="variance", per_token=False, changes_weight=True),
        )
    }
)


def check_combination(mitigations: Sequence[str], phases: str) -> None:
    """Refuse what cannot be computed together.

    Args:
        mitigations: Names among MITIGATIONS; none is the empty sequence.
        phases: `all`, `prefill` or `decode`.

    Raises:
        RecipeError: for an unknown name, two shifts, two variance corrections, or a mitigation
            that changes W where a phase stays dense.
    """
    for name in mitigations:
        if name not in MITIGATIONS:
            raise RecipeError(
                f"Unknown mitigation {name!r}.", allowed=", ".join(["none", *MITIGATIONS])
            )
    _at_most_one(mitigations, "shift", "shift before selection")
    _at_most_one(mitigations, "variance", "variance correction")
    _dense_phase_possible(mitigations, phases)


def uses(mitigations: Sequence[str], corrects: Corrects, *, per_token: bool) -> bool:
    """Whether a mitigation of this kind is among the names."""
    chosen = [MITIGATIONS[name] for name in mitigations]
    return any(one.corrects == corrects and one.per_token == per_token for one in chosen)


def _at_most_one(mitigations: Sequence[str], corrects: Corrects, words: str) -> None:
    given = [name for name in mitigations if MITIGATIONS[name].corrects == corrects]
    if len(given) > 1:
        one_of = [one.name for one in MITIGATIONS.values() if one.corrects == corrects]
        raise RecipeError(
            f"Mitigations {' and '.join(given)} cannot be combined: an op has one {words}.",
            allowed=f"at most one of {', '.join(one_of)}",
        )


def _dense_phase_possible(mitigations: Sequence[str], phases: str) -> None:
    given = [name for name in mitigations if MITIGATIONS[name].changes_weight]
    if given and phases != "all":
        other = "decode" if phases == "prefill" else "prefill"
        raise RecipeError(
            f"Mitigation {given[0]} cannot be used with phases {phases}: it scales the folded "
            f"weight, and {other}, which stays dense, needs the weight unscaled.",
            allowed=f"{given[0]} with --phases all",
            fix=f"drop {given[0]} (var corrects the same per token), or use --phases all",
        )
