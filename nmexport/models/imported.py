"""The weights of a checkpoint that came quantised, as it stores them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.graph.contract import op_contract
from nmexport.models.quantised.gguf_blocks import WITH_MINIMA
from nmexport.models.quantised.gguf_file import GgufIntegers
from nmexport.models.quantised.methods import quantisation_section
from nmexport.models.skeleton import skeleton
from nmexport.models.weight_files import read_config
from nmexport.models.weights import WeightTable

if TYPE_CHECKING:
    from nmexport.models.source import ModelSource
    from nmexport.sparsity.quantisation import QuantisedWeight
    from nmexport.store.kept import KeptWeights, StoredKind


def _takes_floats(name: str) -> bool:
    inputs = op_contract().ops["NMLinear"].inputs
    return any(spec.name == name and "float32" in spec.alternatives for spec in inputs)


_ZERO_POINTS_BETWEEN_STEPS = _takes_floats("weight_zero_point")
"""Executors take zero points that are no whole steps, as GGUF's minima are."""


class ImportedWeights:
    """Reads integers and scales by the names of the model's parameters; keeps none."""

    def __init__(self, table: WeightTable, kept: KeptWeights) -> None:
        """Take what the files hold."""
        self._table = table
        self.kept = kept

    def linear(self, name: str) -> QuantisedWeight | None:
        """The weight of a linear; None where it is stored as floats.

        Raises:
            ModelError: if a file is damaged, or its tensors contradict each other.
        """
        return self.parameter(f"{name}.weight")

    def parameter(self, name: str) -> QuantisedWeight | None:
        """Read a parameter as a linear's weight `[K, O]`; see `linear`."""
        weight = self._table.quantised(name)
        if weight is None or weight.zero_point is None or _ZERO_POINTS_BETWEEN_STEPS:
            return weight
        return None if weight.zero_point.is_floating_point() else weight


def imported_weights(source: ModelSource) -> ImportedWeights | None:
    """Open the quantised weights of a model; None where it has none.

    Also of a `.gguf` that is not unpacked: its integers lie next to the unpacked model.

    Raises:
        ModelError: if its files do not make the model.
    """
    folder = source.weights_folder
    if source.packed:
        return None
    if not GgufIntegers.are_in(folder) and not quantisation_section(folder, read_config(folder)):
        return None
    table = WeightTable(skeleton(source), folder)
    if table.kept is None:
        return None
    kinds = tuple(map(_as_executed, table.kept.kinds))
    return ImportedWeights(table, replace(table.kept, kinds=kinds))


def _as_executed(kind: StoredKind) -> StoredKind:
    """Weights of a kind, dequantised where no executor takes them."""
    if kind.form not in WITH_MINIMA or _ZERO_POINTS_BETWEEN_STEPS:
        return kind
    return replace(kind, reason="no executor takes its minima yet")
