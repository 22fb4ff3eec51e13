"""Checkpoint of an optimisation: one safetensors file, replaced whole."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nmexport.store.tensors import save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_KEY = "state"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors and a little JSON, valid only for the identity that wrote them."""

    path: Path
    identity: str
    """Identity of everything that the optimisation depends on, such as a digest."""

    def save(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Write a temporary file, then replace: a kill leaves the previous checkpoint whole."""
        document = json.dumps({"identity": self.identity, **state})
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        save_tensors(draft, tensors, metadata={_KEY: document})
        draft.replace(self.path)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Load what was saved last; None where there is nothing, or its identity differs."""
        try:
            with safe_open(self.path, framework="pt") as stream:
                state = json.loads((stream.metadata() or {})[_KEY])
                if state.pop("identity") != self.identity:
                    return None
                return {name: stream.get_tensor(name) for name in stream.keys()}, state  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # starting over is always right


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of the long work of one stage, in a folder that belongs to the stage's key."""

    folder: Path | None
    """None keeps nothing."""

    def named(self, work: str, *, of: str = "") -> Checkpoint | None:
        """Return the checkpoint of a piece of work.

        Args:
            work: Names the file.
            of: What the work depends on beside the key, such as what an effort means in this
                version.
        """
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return Checkpoint(self.folder / f"{work}.safetensors", identity=self.folder.name + of)
