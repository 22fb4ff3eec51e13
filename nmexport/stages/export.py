"""Export: the sparse model and its dense baseline as ONNX, with all else that a runtime needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError
from nmexport.graph.versions import IR_VERSION, OPSET
from nmexport.report.model import DenseParity
from nmexport.stages.fitting import check_model
from nmexport.store.exported import DENSE, MODEL
from nmexport.store.records import record_from

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ("fold",)

DENSE_CHECK = "dense_check.json"
# Packages that write the graph: another version may write another one.
_WRITERS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "tokenizers")


@dataclass(frozen=True)
class Artifact:
    """A finished export."""

    path: Path

    @property
    def model(self) -> Path:
        """The sparse model."""
        return self._existing(self.path / MODEL)

    @property
    def dense_model(self) -> Path:
        """The baseline: the same graph with plain MatMul and original weights."""
        return self._existing(self.path / DENSE / MODEL)

    @property
    def dense_check(self) -> DenseParity:
        """How far the dense file is from torch; see `verification.dense_check`.

        Raises:
            ArtifactError: if it cannot be read.
        """
        path = self.path / DENSE_CHECK
        if not path.is_file():
            return DenseParity(why="this export was made without the check")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return record_from(DenseParity, document, lenient=True)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}", fix="export again") from error

    def _existing(self, path: Path) -> Path:
        for file in (path, path.with_name(f"{path.name}.data")):
            if not file.is_file():
                raise ArtifactError(
                    f"The export lacks {file}.", fix="run the build with --force export"
                )
        return path


def key_fields(inputs: StageInputs) -> dict[str, object]:
    """The model and what writes it."""
    section = inputs.recipe.model
    return {
        "model": inputs.source.digest,
        "dtype": section.dtype,
        "trust_remote_code": section.trust_remote_code,
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "linears": "fused by input",
        "embedding": "in the form of the weights",
        "dense_baseline": section.dense_baseline,
        "dense_check": "linear by linear",
        "writers": {name: inputs.environment.version(name) for name in _WRITERS},
    }


def check(inputs: StageInputs) -> None:
    """Refuse a model that export cannot take, before anything runs.

    Raises:
        ModelError: see `fitting.check_model`.
    """
    check_model(inputs.source, inputs.recipe.model.dtype)


def run(inputs: StageInputs) -> dict[str, object]:
    """Write and check both models, with all else that a runtime needs; see `exporting.run`."""
    from nmexport.stages import exporting

    return exporting.run(inputs)
