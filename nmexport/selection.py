"""The stages: which there are, which a run is about, what became of each."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from nmexport.errors import GateFailed, RecipeError
from nmexport.store.artifact import KEY_CHARS

if TYPE_CHECKING:
    from collections.abc import Mapping

STAGES: Mapping[str, str] = MappingProxyType(
    {
        "calibrate": "nmexport.stages.calibrate",
        "fold": "nmexport.stages.fold",
        "export": "nmexport.stages.export",
        "engine": "nmexport.stages.engine",
        "verify": "nmexport.stages.verify",
        "package": "nmexport.stages.package",
    }
)
"""Modules by stage, in order of running; imported only when a build needs them."""

Action = Literal["cached", "run", "depends", "refused"]
"""`depends`: an upstream runs, and what it writes decides. `refused`: a gate failed before it."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which stages a run is about: first to last; those before the first must be complete."""

    first: str = next(iter(STAGES))
    last: str = list(STAGES)[-1]
    force: frozenset[str] = frozenset()
    """Stages to run although they are complete."""
    check: bool = False
    """Compare the contents of every cached file with its digest."""

    def __post_init__(self) -> None:
        """Refuse unknown and empty selections.

        Raises:
            RecipeError: if a stage is unknown, or the last comes before the first.
        """
        order = list(STAGES)
        for stage in (self.first, self.last, *sorted(self.force)):
            if stage not in order:
                raise RecipeError(f"There is no stage {stage!r}.", allowed=", ".join(order))
        if order.index(self.first) > order.index(self.last):
            raise RecipeError(
                f"--from {self.first} comes after --to {self.last}.",
                allowed=f"in this order: {', '.join(order)}",
            )
        outside = sorted(self.force - set(self.stages))
        if outside:
            raise RecipeError(
                f"--force {outside[0]} is outside of {self.first} to {self.last}.",
                allowed=", ".join(self.stages),
            )

    @property
    def stages(self) -> list[str]:
        """The stages from first to last."""
        order = list(STAGES)
        return order[order.index(self.first) : order.index(self.last) + 1]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage in a run: planned, or done."""

    stage: str
    key: str
    action: Action
    reason: str
    bytes: int | None = None
    """Size of the finished artifact; None where there is none yet."""
    seconds: float | None = None
    """How long it took, where it ran."""
    peak_memory_bytes: int | None = None
    """Most that the process held meanwhile, where it ran."""

    def as_dict(self) -> dict[str, object]:
        """JSON values."""
        return {**vars(self), "key": self.key[:KEY_CHARS]}


class StageRefused(GateFailed):
    """A failed gate kept a stage from running; the stages before it are finished and in use."""

    def __init__(self, problem: str, steps: list[Step]) -> None:
        """Keep what ran beside the reason.

        Args:
            problem: Which gate failed.
            steps: What was done about each stage, the refused one last.
        """
        super().__init__(problem)
        self.steps = steps
