"""`layers.json`: the sparsified linears of a model, as data for every stage after calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from nmexport.choices import Phase  # noqa: TC001  records are read by their annotations
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.weight_form import WeightType  # noqa: TC001
from nmexport.store.records import read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SCHEMA = 4
FILENAME = "layers.json"

ModelPhases = Literal["all", "prefill", "decode", "mixed"]
"""Phases of a whole model: `mixed` where its linears differ."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One target linear, and what its NMLinear node will carry.

    Which optional inputs a node has is read from the fold artifact: `<name>.W [K, O]`,
    and where present `<name>.bias [O]`, `<name>.shift [1] or [K]`, `<name>.shift_weight [O]`,
    `<name>.score_scale [K]`, `<name>.channel_order [K]`, `<name>.weight_scale [G, O]`,
    `<name>.value_scale [K]`, `<name>.weight_zero_point [G, O]`, `<name>.dense_scale [K]`,
    `<name>.dense_bias [O]`. All that lies along K is in the
    order of `channel_order`, or of `input_order`: see `outputs_for`.
    """

    name: str
    """Dotted module name in the Hugging Face model."""
    in_features: int
    out_features: int
    pattern: NMPattern
    criterion: str
    mitigations: tuple[str, ...] = ()
    grouping: str = "consecutive"
    phase: Phase = "all"
    dynamic_shift: bool = False
    variance_correction: bool = False
    has_bias: bool = False
    """The dense linear has a bias of its own."""
    relative_error: float | None = None
    """Calibrated `||y_sparse - y_dense|| / ||y_dense||` on the dense model's activations, before
    anything is learned."""
    gap_closed: float | None = None
    """Share of the extra loss of consecutive groups that this linear's order saves; 1 is as good as
    unstructured selection of as many channels. Loss is dropped score energy. None: not measured."""
    remainder_rank: int | None = None
    """Rank of the low-rank product next to the op (`r-sparse`)."""
    weight_type: WeightType = "float"
    """Type of W and its zero point. The fold artifact holds 4 bits in a byte of their own."""
    activation_bits: Literal[0, 8] = 0
    activation_block: int = 32
    outputs_for: str | None = None
    """Name of the linear that reads this one's outputs, where they lie in its order of channels:
    its node gathers nothing, and has no `channel_order`. Two such linears packed into one have each
    half in that order."""


def as_dense(layer: LayerSpec) -> LayerSpec:
    """Describe the same linear as a dense one: all input kept, nothing corrected."""
    whole = NMPattern(layer.pattern.m, layer.pattern.m)
    return replace(
        layer, pattern=whole, phase="all", dynamic_shift=False, variance_correction=False
    )


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The file."""

    layers: tuple[LayerSpec, ...]
    """Linears that are sparse."""
    dense: tuple[LayerSpec, ...] = ()
    """Linears that keep all of their input, and whose weights are stored in integers too."""
    embedding_bits: Literal[0, 8] = 0
    """8 where the input embedding is stored in integers, a scale for each group
    of columns of a row."""


def model_phases(layers: Iterable[LayerSpec]) -> ModelPhases:
    """Derive a model's phases from its linears'."""
    phases = {layer.phase for layer in layers}
    return phases.pop() if len(phases) == 1 else "mixed"


def write_layers(folder: Path, layers: Layers) -> None:
    """Write `layers.json`."""
    write_record(layers, folder / FILENAME, schema=SCHEMA)


def read_layers(folder: Path) -> Layers:
    """Read `layers.json`.

    Raises:
        ArtifactError: if it is missing, malformed, or of another schema.
    """
    path = folder / FILENAME
    fix = "rebuild the stage with --force"
    return read_record(Layers, path, schema=SCHEMA, fix=fix)
