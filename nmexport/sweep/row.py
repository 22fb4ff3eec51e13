"""A measured cell of a sweep: a row of `sweep.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.store.records import json_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nmexport.sparsity.pattern import NMPattern


@dataclass(frozen=True, kw_only=True)
class Perplexities:
    """Perplexity of both models."""

    dense: float
    sparse: float


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Speed-up over dense."""

    prefill: float | None = None
    decode: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The measurements of a cell."""

    perplexity: Perplexities
    tokens: int
    perplexity_ratio: float
    perplexity_ratio_stderr: float | None
    kl_mean: float
    top1_agreement: float
    speedup: Speeds | None = None
    """None where only accuracy was measured."""
    seconds: float = 0.0
    """Time that it took to measure."""

    def as_json(self) -> dict[str, object]:
        """JSON values; without a speed where there is none."""
        document = json_from(self)
        if self.speedup is None:
            del document["speedup"]
        return document


@dataclass(frozen=True, kw_only=True)
class Row:
    """Settings of a cell, and its figures or why there are none."""

    model: str
    label: str
    baseline: str | None = None
    pattern: NMPattern | None = None
    """None of a baseline, and of what was refused."""
    criterion: str | None = None
    mitigations: tuple[str, ...] | None = None
    grouping: str | None = None
    phases: str | None = None
    settings: Mapping[str, str]
    refused: str | None = None
    figures: Figures | None = None

    def as_json(self) -> dict[str, object]:
        """JSON values, the figures among the settings; `refused` only where it was."""
        document = json_from(self)
        del document["figures"]
        if self.refused is None:
            del document["refused"]
        return document | (self.figures.as_json() if self.figures else {})
