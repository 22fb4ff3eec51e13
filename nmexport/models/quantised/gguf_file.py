"""The integers of a GGUF's weights, kept next to the dequantised model that stages read.

A matrix is matched with the parameter that transformers made of it. Transformers puts the rows of q
and k of some families into another order; the integers follow. Where no known order gives what
transformers loaded, the matrix stays dequantised.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from nmexport.errors import ModelError
from nmexport.models.gguf_files import open_merged
from nmexport.models.quantised.gguf_blocks import gguf_weight, kept_type
from nmexport.sparsity.quantisation import QuantisedWeight
from nmexport.store.kept import KeptWeights, stored_kinds
from nmexport.store.records import json_from, record_from
from nmexport.store.tensors import ShardedWriter, TensorReader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from nmexport.sparsity.weight_form import StoredType

INTEGERS = "integers"
"""Stem of the files that hold them."""
_RECORD = f"{INTEGERS}.json"
_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
_ROUNDING = 1e-6  # of the largest weight: types with minima are computed in another order


def write_integers(
    files: Sequence[Path], model: nn.Module, names: Mapping[str, str], folder: Path
) -> None:
    """Write the integers of every matrix that the op can hold; nothing where all are floats.

    Args:
        files: The `.gguf`, or its parts.
        model: What transformers made of it, in float32.
        names: Parameter by the name of the tensor in the file.
        folder: To write to.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    types: dict[str, str] = {}
    counted: list[tuple[str, str | None, int]] = []
    with ShardedWriter(folder, INTEGERS) as writer:
        for tensor in open_merged(files).tensors:
            kind = tensor.tensor_type.name
            parameter = parameters.get(names.get(tensor.name, ""))
            if kind in _FLOATS or parameter is None:
                continue
            weight, reason = _match(tensor.data, kind, parameter, model)
            counted.append((kind, reason, parameter.numel()))
            if weight is None:
                continue
            name = names[tensor.name]
            types[name] = weight.type
            writer.add({f"{name}.{part}": value for part, value in _tensors(weight).items()})
    if not counted:
        return
    kept = KeptWeights(method="GGUF", kinds=stored_kinds(counted))
    document = {"types": types, "kept": json_from(kept)}
    (folder / _RECORD).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


class GgufIntegers:
    """Reads what `write_integers` wrote."""

    def __init__(self, folder: Path) -> None:
        """Read the record.

        Raises:
            ModelError: if it cannot be read.
        """
        try:
            document = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            self.kept = record_from(KeptWeights, document["kept"])
            self._types: dict[str, StoredType] = document["types"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{folder / _RECORD} cannot be read: {error}", fix=f"remove {folder}"
            ) from error
        self._reader = TensorReader(folder, INTEGERS)

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Tell whether a folder holds some."""
        return (folder / _RECORD).is_file()

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters whose integers are kept."""
        return tuple(self._types)

    def read(self, name: str) -> QuantisedWeight:
        """Read the integers of one parameter."""
        read = {
            part: self._reader.read(f"{name}.{part}")
            for part in ("values", "scale", "zero_point")
            if f"{name}.{part}" in self._reader
        }
        return QuantisedWeight(type=self._types[name], **read)


def _tensors(weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    parts = {"values": weight.values, "scale": weight.scale}
    return parts if weight.zero_point is None else {**parts, "zero_point": weight.zero_point}


def _match(
    data: Any, kind: str, parameter: torch.Tensor, model: nn.Module
) -> tuple[QuantisedWeight | None, str | None]:
    """Find the integers that make a parameter; or None, and why not."""
    type_ = kept_type(kind)
    if type_ is None:
        return None, "its values are no multiples of a scale"
    if parameter.ndim != 2:  # noqa: PLR2004
        return None, "it is no matrix"
    if len(parameter) % 2 and type_ in {"int4", "uint4"}:
        return None, "an odd number of outputs in 4 bits"
    weight = gguf_weight(data, kind)
    made = weight.dequantised().t()
    limit = _ROUNDING * float(parameter.abs().max())
    if made.shape != parameter.shape:
        return None, "its shape is another one in the model"
    for rows in _row_orders(model, len(parameter)):
        if float((made[rows] - parameter).abs().max()) <= limit:
            return _with_rows(weight, rows), None
    return None, "its rows lie in another order in the model"


def _row_orders(model: nn.Module, rows: int) -> Iterator[torch.Tensor]:
    """Orders in which transformers may have put a matrix's rows: none, or a head's halves."""
    plain = torch.arange(rows)
    yield plain
    config: Any = model.config
    for heads in (config.num_attention_heads, getattr(config, "num_key_value_heads", None)):
        if heads and rows % (2 * heads) == 0:
            yield plain.reshape(heads, -1, 2).swapaxes(1, 2).flatten()


def _with_rows(weight: QuantisedWeight, rows: torch.Tensor) -> QuantisedWeight:
    """Reorder the outputs of a weight."""
    zero_point = None if weight.zero_point is None else weight.zero_point[:, rows].contiguous()
    return QuantisedWeight(
        values=weight.values[:, rows].contiguous(),
        scale=weight.scale[:, rows].contiguous(),
        type=weight.type,
        zero_point=zero_point,
    )
