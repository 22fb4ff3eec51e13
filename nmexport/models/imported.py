"""The weights of a quantised checkpoint, as it stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.models.quantised.gguf_file import GgufIntegers
from nmexport.models.quantised.methods import quantisation_section
from nmexport.models.skeleton import skeleton
from nmexport.models.weight_files import read_config
from nmexport.models.weights import WeightTable

if TYPE_CHECKING:
    from nmexport.models.source import ModelSource
    from nmexport.sparsity.quantisation import QuantisedWeight
    from nmexport.store.kept import KeptWeights


class ImportedWeights:
    """Reads integers and scales by the names of the model's parameters; keeps none."""

    def __init__(self, table: WeightTable, kept: KeptWeights) -> None:
        """List what the files hold."""
        self._table = table
        self.kept = kept

    def linear(self, name: str) -> QuantisedWeight | None:
        """Read the weight of a linear; None where it is stored as floats.

        Raises:
            ModelError: if a file is damaged, or its tensors contradict each other.
        """
        return self.parameter(f"{name}.weight")

    def parameter(self, name: str) -> QuantisedWeight | None:
        """Read a parameter as a linear's weight `[K, O]`; see `linear`."""
        return self._table.quantised(name)


def imported_weights(source: ModelSource, *, keeps_float8: bool = False) -> ImportedWeights | None:
    """Open the quantised weights of a model; None where it has none.

    Also of a `.gguf` that is not unpacked: its integers lie next to the unpacked model.

    Args:
        source: The model.
        keeps_float8: Whether 8-bit floats are kept, and not dequantised.

    Raises:
        ModelError: if its files do not make the model.
    """
    folder = source.weights_folder
    if source.packed:
        return None
    if not GgufIntegers.are_in(folder) and not quantisation_section(folder, read_config(folder)):
        return None
    table = WeightTable(skeleton(source), folder, keeps_float8=keeps_float8)
    return None if table.kept is None else ImportedWeights(table, table.kept)
