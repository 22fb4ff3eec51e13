"""A folded model on disk: its sparse linears, their tensors, and how its constants were learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from nmexport.store.kept import KeptWeights
from nmexport.store.layers import Layers, LayerSpec, read_layers
from nmexport.store.records import read_record, write_record
from nmexport.store.tensors import StoredGroup, TensorReader

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

SHARED = ("W", "weight_zero_point")
"""Tensors of a linear as a dense one that are the sparse one's where they are not stored."""
DENSE = "dense"
"""Between the name of a sparse linear and those of its tensors as a dense one."""
LEARNING = "learning.json"
"""The learned constants' settings and loss curve."""
INPUT_ORDER = "input_order"
"""After the name of a linear, the order `[K]` int32 that its input lies in already."""
KEPT = "kept.json"
"""What is kept of a checkpoint that came quantised."""
_KEPT_SCHEMA = 1
TENSORS = (
    "W",
    "bias",
    "shift",
    "shift_weight",
    "score_scale",
    "channel_order",
    "weight_scale",
    "value_scale",
    "weight_zero_point",
    "dense_scale",
    "dense_bias",
    "remainder_in",
    "remainder_out",
)


@dataclass(frozen=True)
class FoldedModel:
    """The artifact of the stage `fold`."""

    path: Path

    @property
    def layers(self) -> list[LayerSpec]:
        """The sparse linears, in model order."""
        return list(self._layers.layers)

    @property
    def dense_layers(self) -> list[LayerSpec]:
        """Linears that keep all of their input, and are stored in integers as the sparse ones."""
        return list(self._layers.dense)

    @property
    def linears(self) -> list[LayerSpec]:
        """All linears that are nodes of ours in the sparse model."""
        return [*self._layers.layers, *self._layers.dense]

    @property
    def embedding_bits(self) -> int:
        """8 where the input embedding is stored in integers; see `rounded_rows`."""
        return self._layers.embedding_bits

    @property
    def is_quantised(self) -> bool:
        """Tell whether weights are stored in integers."""
        return any(layer.weight_type != "float" for layer in self.linears)

    @property
    def kept(self) -> KeptWeights | None:
        """The kept part of a checkpoint that came quantised; None where it did not, or is rounded.

        Raises:
            ArtifactError: if the record is malformed.
        """
        path = self.path / KEPT
        fix = "rebuild the stage with --force"
        return (
            read_record(KeptWeights, path, schema=_KEPT_SCHEMA, fix=fix) if path.exists() else None
        )

    @property
    def learning(self) -> dict[str, object] | None:
        """How the learned constants came about: `settings` and `curve`; None without any."""
        try:
            document: dict[str, object] = json.loads((self.path / LEARNING).read_text("utf-8"))
        except FileNotFoundError:
            return None
        return document

    def tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """Read the tensors of one linear by their name in the op contract: `W`, and those it uses.

        Each is read when it is asked for, and not kept.

        Raises:
            ArtifactError: if the file is damaged, or does not hold this linear.
        """
        stored = [kind for kind in TENSORS if kind == "W" or f"{name}.{kind}" in self._reader]
        return StoredGroup(self._reader, name, stored)

    def input_order(self, name: str) -> torch.Tensor | None:
        """Return the order `[K]` int32 of a linear's input: position k holds channel `[k]`.

        None where it lies in the dense model's own; see `LayerSpec.outputs_for`.

        Raises:
            ArtifactError: if the file is damaged.
        """
        stored = f"{name}.{INPUT_ORDER}"
        return self._reader.read(stored) if stored in self._reader else None

    def dense_tensors(self, name: str) -> Mapping[str, torch.Tensor]:
        """Read the tensors of one linear as a dense one, stored alike, to compare with.

        Raises:
            ArtifactError: if the file is damaged, or does not hold this linear.
        """
        other = f"{name}.{DENSE}"
        own = [kind for kind in TENSORS if f"{other}.{kind}" in self._reader]
        if not own:
            return self.tensors(name)
        shared = {
            kind: f"{name}.{kind}"
            for kind in SHARED
            if kind not in own and f"{name}.{kind}" in self._reader
        }
        return StoredGroup(self._reader, other, own, shared=shared)

    @cached_property
    def _layers(self) -> Layers:
        return read_layers(self.path)

    @cached_property
    def _reader(self) -> TensorReader:
        """Read the index once: it is long, and serves all linears."""
        return TensorReader(self.path)


def write_kept(folder: Path, kept: KeptWeights) -> None:
    """Write what is kept of a checkpoint's weights; `FoldedModel.kept` reads it."""
    write_record(kept, folder / KEPT, schema=_KEPT_SCHEMA)


def write_learning(folder: Path, *, settings: dict[str, object], curve: dict[str, object]) -> None:
    """Write how the constants were learned; `FoldedModel.learning` reads it."""
    document = {"settings": settings, "curve": curve}
    (folder / LEARNING).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
