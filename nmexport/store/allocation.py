"""`allocation.json`: a choice for every linear, and the figures behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nmexport.choices import Phase  # noqa: TC001  records are read by their annotations
from nmexport.sparsity.pattern import NMPattern  # noqa: TC001
from nmexport.sparsity.weight_form import finest_first
from nmexport.store.records import json_from, read_record

if TYPE_CHECKING:
    from pathlib import Path

PointKind = Literal["front", "uniform", "chosen", "integers", "floats"]

SCHEMA = 1
FILENAME = "allocation.json"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Pattern, criterion, phase and form of weights of one linear; without pattern it is dense."""

    pattern: NMPattern | None = None
    criterion: str | None = None
    phase: Phase = "all"
    weights: str | None = None
    """Form of the weights; None where all linears have the same."""

    @property
    def selection(self) -> Choice:
        """The same in no form of its own: what is kept, and when."""
        return replace(self, weights=None)

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
        """`dense`, `8:16 act`, `8:16 act, decode only`, `dense int4`, `8:16 act int8`."""
        words = "dense" if self.pattern is None else f"{self.pattern} {self.criterion}"
        words = words if self.weights is None else f"{words} {self.weights}"
        return words if self.phase == "all" else f"{words}, {self.phase} only"


DENSE = Choice()


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One allocation on the Pareto front, or a uniform one to compare with."""

    kind: PointKind
    """`integers` is the dense model, its weights in integers; `floats` is sparse with weights in
    floats. Both are there where weights are integers: quantisation alone, and sparsity alone."""
    label: str
    bytes_saved: float
    """Share of the targeted linears' weight bytes that a decoded token no longer reads, of what the
    dense model reads with weights of the same type."""
    decode_speedup: float
    """By the cost model, to the same."""
    summed_kl: float
    """Sum of the divergences that each site causes alone, nats a token."""
    kl: float
    """Divergence of the joint model, measured on held-out calibration windows."""
    perplexity_ratio: float
    """The same model's, on the same windows."""
    linears: dict[str, int]
    """Linears by the label of their choice."""
    float_bytes: float | None = None
    """Bytes read, as a share of what the dense model reads in floats; None where weights are
    floats."""
    float_speedup: float | None = None
    """Speed, times that of the dense model in floats, by the cost model; None likewise."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A choice for one linear, and what it costs."""

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
    """Measured result of a choice once built, with learned constants and rounding."""

    kl: float
    """Divergence of the built model, on the held-out windows that the choice was measured on; none
    of them was learned from."""
    perplexity_ratio: float
    budget_used: float | None
    """Share of the budget of accuracy that it takes: beyond 1, the budget is exceeded."""


@dataclass(frozen=True, kw_only=True)
class CostConstants:
    """Constants of the cost model: a decoded token's time at batch 1."""

    bytes_per_second: float
    """Speed at which a decoded token's weights stream in."""
    dense_overhead_seconds: float
    """A dense product's time beyond reading its weight; linears that share an input are one."""
    sparse_overhead_seconds: float
    """The same of a sparse product, with finding the rows."""
    element_bytes: int
    """Size of a weight in floats."""
    sparse_weights: str = "float"
    """How targeted linears are stored: see `nmexport.sparsity.weight_form.FORMS`. Of several forms
    that a budget chose among, the finest."""
    integer_bytes_per_second: float | None = None
    """The speed at which weights in integers stream in; None is the same."""
    other_bytes: int = 0
    """Weights outside the targeted linears that every decoded token reads."""
    other_weights: str = "float"
    """How those are stored: nearly all of them are the output head's."""
    rest_seconds: float = 0.0
    """A decoded token's time in attention, norms, dispatch: all that multiplies no weights."""


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
    cost: CostConstants


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The choice for every targeted linear, and its evidence."""

    choices: dict[str, Choice]
    """By linear, in model order."""
    budget: dict[str, float]
    """The limits asked for."""
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
        return {name: one for name, one in self.choices.items() if one.pattern is not None}

    @property
    def forms(self) -> dict[str, str]:
        """Forms of weights that were chosen, by linear; none where all have the same."""
        return {name: one.weights for name, one in self.choices.items() if one.weights is not None}

    def count_forms(self) -> dict[str, int]:
        """Count the linears by the form of their weights, the finest first."""
        forms = list(self.forms.values())
        return {form: forms.count(form) for form in finest_first(forms)}

    def summary(self) -> str:
        """Say what was chosen, and how it turned out once it is built, in a line."""
        words = (
            f"{self.bytes_saved:.0%} of the bytes saved: perplexity ratio "
            f"{self.perplexity_ratio:.3f} as chosen"
        )
        if self.built is None:
            return words
        words += f", {self.built.perplexity_ratio:.3f} as built"
        used = self.built.budget_used
        return f"{words}, which exceeds the budget" if used is not None and used > 1 else words


def as_dict(allocation: Allocation) -> dict[str, object]:
    """Convert to JSON values, with the schema; floats with six significant digits.

    What follows the sixth digit is the summation order of the machine.
    """
    return {"schema": SCHEMA, **_round_floats(json_from(allocation))}


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
    if not path.exists():
        return None
    return read_record(Allocation, path, schema=SCHEMA, fix="rebuild the stage with --force")


def _round_floats(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _round_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_round_floats(item) for item in value]
    return value
