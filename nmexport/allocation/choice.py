"""What allocation decides, as data: `allocation.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import ArtifactError
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
FILENAME = "allocation.json"

Phases = Literal["all", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one linear becomes; dense where there is no pattern."""

    pattern: str | None = None
    """N:M."""
    criterion: str | None = None
    phase: Phases = "all"

    @property
    def nm(self) -> NMPattern | None:
        """The parsed pattern; None where dense."""
        return None if self.pattern is None else NMPattern.parse(self.pattern)

    @property
    def decode_density(self) -> float:
        """Share of weight rows that a decoded token reads."""
        return 1.0 if self.nm is None or self.phase == "prefill" else self.nm.density

    @property
    def prefill_density(self) -> float:
        """Share of multiply-adds that a prompt's token needs."""
        return 1.0 if self.nm is None or self.phase == "decode" else self.nm.density

    @property
    def label(self) -> str:
        """`dense`, `8:16 act`, `8:16 act, decode only`."""
        if self.pattern is None:
            return "dense"
        words = f"{self.pattern} {self.criterion}"
        return words if self.phase == "all" else f"{words}, {self.phase} only"


DENSE = Choice()


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One allocation on the Pareto front, or a uniform one beside it."""

    kind: Literal["front", "uniform", "chosen"]
    label: str
    bytes_saved: float
    """Share of the targeted linears' weight bytes that a decoded token no longer reads."""
    decode_speedup: float
    """By the cost model."""
    summed_kl: float
    """Sum of the divergences that each site causes alone, nats a token."""
    kl: float
    """Of the joint model, measured on held-out calibration windows."""
    perplexity_ratio: float
    """The same model's, on the same windows."""
    linears: dict[str, int]
    """Linears by the label of their choice."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What one choice costs one linear."""

    choice: Choice
    kl: float
    """Divergence, nats a token, that its whole site causes alone; 0 where dense."""
    kl_stderr: float | None
    """Standard error over windows; None where the divergence was not measured but follows from
    that of the site's other choices."""
    relative_error: float | None
    """`||y_sparse - y_dense|| / ||y_dense||` of this linear alone, on dense activations."""
    bytes_saved: float
    """Of the linear's own bytes a decoded token."""


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One linear: what it could have been, what it became, and why."""

    name: str
    site: tuple[str, ...]
    """Linears that read the same input and share the choice."""
    weight_bytes: int
    choice: Choice
    why: str
    candidates: tuple[Candidate, ...]
    mitigation_errors: dict[str, float | None]
    """Relative output error of this linear alone with each mitigation, at `mitigation_pattern`;
    `as built` is that of all that it was given, learned constants among them."""
    mitigation_pattern: str


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a choice came to once it was built: learned constants, rounding and all."""

    kl: float
    """Of the built model, on the held-out windows that the choice was measured on; none of them was
    learned from."""
    perplexity_ratio: float
    budget_used: float | None
    """The share of the budget of accuracy that it takes: beyond 1 it is broken."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The choice for every targeted linear, and all that it stands on."""

    choices: dict[str, Choice]
    """By linear, in model order."""
    budget: dict[str, float]
    """What was asked for."""
    bytes_saved: float
    decode_speedup: float
    """Predicted."""
    kl: float
    """Of the joint model, measured on held-out calibration windows."""
    perplexity_ratio: float
    """The same."""
    price: float | None
    """Nats that one more percent of the targeted linears' bytes costs at this point."""
    front: tuple[FrontPoint, ...]
    ledger: tuple[LedgerRow, ...]
    budget_used: float | None = None
    """Of the budget of accuracy, the share that the joint model takes; None without."""
    built: Built | None = None
    """None until it is built."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """How it was measured: windows, tokens, cost model, fit, in words and numbers."""

    @property
    def sparse(self) -> dict[str, Choice]:
        """Choices of the linears that are not left dense."""
        return {name: one for name, one in self.choices.items() if one.pattern is not None}


def as_dict(allocation: Allocation) -> dict[str, Any]:
    """JSON values, with the schema; floats with six significant digits.

    What follows the sixth digit is the summation order of the machine.
    """
    document: dict[str, Any] = _rounded({"schema": SCHEMA, **asdict(allocation)})
    return document


def from_dict(document: dict[str, Any]) -> Allocation:
    """The reverse of `as_dict`.

    Raises:
        KeyError, TypeError, ValueError: if it is none.
    """
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']} instead of {SCHEMA}")
    fields = {key: value for key, value in document.items() if key != "schema"}
    built = document.get("built")
    return Allocation(
        **{
            **fields,
            "choices": {name: Choice(**one) for name, one in document["choices"].items()},
            "front": tuple(FrontPoint(**one) for one in document["front"]),
            "ledger": tuple(_row(one) for one in document["ledger"]),
            "built": Built(**built) if built is not None else None,
        }
    )


def write_allocation(folder: Path, allocation: Allocation) -> None:
    """Write `allocation.json`."""
    text = json.dumps(as_dict(allocation), indent=1, allow_nan=False) + "\n"
    (folder / FILENAME).write_text(text, encoding="utf-8")


def read_allocation(folder: Path) -> Allocation | None:
    """Read `allocation.json`; None where the build had no budget.

    Raises:
        ArtifactError: if it is malformed, or of another schema.
    """
    path = folder / FILENAME
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}", fix="rebuild the stage with --force"
        ) from error


def _row(document: dict[str, Any]) -> LedgerRow:
    candidates = tuple(
        Candidate(**{**one, "choice": Choice(**one["choice"])}) for one in document["candidates"]
    )
    return LedgerRow(
        **{
            **document,
            "site": tuple(document["site"]),
            "choice": Choice(**document["choice"]),
            "candidates": candidates,
        }
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
