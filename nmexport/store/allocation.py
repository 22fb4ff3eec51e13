"""A choice for every linear and the figures it stands on: `allocation.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from nmexport.errors import ArtifactError, PatternError
from nmexport.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
FILENAME = "allocation.json"

Phases = Literal["all", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one linear becomes; dense where there is no pattern."""

    pattern: NMPattern | None = None
    criterion: str | None = None
    phase: Phases = "all"

    @property
    def decode_density(self) -> float:
        """Share of weight rows that a decoded token reads."""
        return 1.0 if self.pattern is None or self.phase == "prefill" else self.pattern.density

    @property
    def prefill_density(self) -> float:
        """Share of multiply-adds that a prompt's token needs."""
        return 1.0 if self.pattern is None or self.phase == "decode" else self.pattern.density

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
    """Divergence of the joint model, measured on held-out calibration windows."""
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
    """Share of the linear's own bytes that a decoded token no longer reads."""


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
    mitigation_pattern: NMPattern


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a choice came to once it was built: learned constants, rounding and all."""

    kl: float
    """Divergence of the built model, on the held-out windows that the choice was measured on; none
    of them was learned from."""
    perplexity_ratio: float
    budget_used: float | None
    """Share of the budget of accuracy that it takes: beyond 1, the budget is exceeded."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a choice was measured."""

    words: str
    sites: int
    windows: int
    """Windows on which sites were tried alone."""
    held_out_windows: int
    """Windows on which joint models were run."""
    length: int
    """Tokens of a window."""
    prompt: int
    """Tokens of a window that are not scored."""
    joint_over_sum: float | None
    """Divergence of joint models over the sum of their sites', geometric mean."""
    cost: dict[str, float | str]
    """Constants of the cost model."""


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
    """Divergence of the joint model, measured on held-out calibration windows."""
    perplexity_ratio: float
    """The same model's, on the same windows."""
    price: float | None
    """Nats that one more percent of the targeted linears' bytes costs at this point."""
    front: tuple[FrontPoint, ...]
    ledger: tuple[LedgerRow, ...]
    budget_used: float | None = None
    """Share of the budget of accuracy that the joint model takes; None without such a budget."""
    built: Built | None = None
    """None until it is built."""
    remark: str | None = None
    """Said where the cost model sees no gain in the choice."""
    protocol: Protocol | None = None
    """How it was measured; None where it is not told."""

    @property
    def sparse(self) -> dict[str, Choice]:
        """Choices of the linears that are not left dense."""
        return {name: choice for name, choice in self.choices.items() if choice != DENSE}


def as_dict(allocation: Allocation) -> dict[str, Any]:
    """Convert to JSON values, with the schema; floats with six significant digits.

    What follows the sixth digit is the summation order of the machine.
    """
    return {"schema": SCHEMA, **_json(allocation)}


def from_dict(document: dict[str, Any]) -> Allocation:
    """Reverse `as_dict`.

    Raises:
        KeyError, TypeError, ValueError: if it is no allocation.
    """
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']} instead of {SCHEMA}")
    values = {key: value for key, value in document.items() if key != "schema"}
    built, protocol = document.get("built"), document.get("protocol")
    values |= {
        "choices": {name: _choice(choice) for name, choice in document["choices"].items()},
        "front": tuple(FrontPoint(**point) for point in document["front"]),
        "ledger": tuple(_row(row) for row in document["ledger"]),
        "built": None if built is None else Built(**built),
        "protocol": None if protocol is None else Protocol(**protocol),
    }
    return Allocation(**values)


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
    except (OSError, ValueError, KeyError, TypeError, PatternError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}", fix="rebuild the stage with --force"
        ) from error


def _choice(document: dict[str, Any]) -> Choice:
    pattern = document["pattern"]
    return Choice(**{**document, "pattern": None if pattern is None else NMPattern.parse(pattern)})


def _row(document: dict[str, Any]) -> LedgerRow:
    values = {
        "site": tuple(document["site"]),
        "choice": _choice(document["choice"]),
        "candidates": tuple(
            Candidate(**{**candidate, "choice": _choice(candidate["choice"])})
            for candidate in document["candidates"]
        ),
        "mitigation_pattern": NMPattern.parse(document["mitigation_pattern"]),
    }
    return LedgerRow(**{**document, **values})


def _json(value: Any) -> Any:
    if isinstance(value, NMPattern):
        return str(value)
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if is_dataclass(value):
        return {field.name: _json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_json(item) for item in value]
    return value
