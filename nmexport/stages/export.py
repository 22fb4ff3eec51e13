"""Export: the sparse model and its dense baseline as ONNX, with all else that a runtime needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError, EnvironmentFault
from nmexport.graph.versions import IR_VERSION, OPSET
from nmexport.models.tokenizer_files import write_tokenizer
from nmexport.progress import busy
from nmexport.report.model import DenseParity
from nmexport.stages import fold
from nmexport.stages.fitting import check_model
from nmexport.store.exported import DENSE, MODEL
from nmexport.store.records import json_from, record_from

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from nmexport.stages.inputs import StageInputs

UPSTREAM: tuple[str, ...] = ("fold",)

DENSE_CHECK = "dense_check.json"
_NO_ROOM = "without the dense baseline, the disk has no room for a dense file to hold against torch"
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
    """Trace, clean, assemble, write and check both models; write config and tokenizer with them.

    Raises:
        ModelError: if the model cannot be loaded or its architecture cannot be exported.
        InternalError: if what was written is not what it should be.
    """
    import torch

    from nmexport.models.loader import load_tokenizer
    from nmexport.models.streaming import open_for_export
    from nmexport.stages.exporting import stored_parts, trace_model, write_configs, write_models

    section = inputs.recipe.model
    folded = fold.Artifact(inputs.upstream["fold"])
    with busy(inputs.progress, "export: load the model"):
        opened = open_for_export(inputs.source, dtype=getattr(torch, section.dtype))
    model = opened.model
    inputs.progress.note(f"export: {model.config.model_type}")
    _check_disk(inputs, model, len(folded.layers))
    checked = section.dense_baseline or _has_room(inputs, model, copies=2)
    with busy(inputs.progress, "export: trace and write"):
        traced = trace_model(
            model, [layer.name for layer in folded.linears], parameter=opened.parameter
        )
        metrics = write_models(
            traced,
            folded.linears,
            folded.tensors,
            inputs.output,
            dense_baseline=checked,
            stored=stored_parts(
                folded, traced, inputs.source, dense_baseline=section.dense_baseline
            ),
        )
    with busy(inputs.progress, "export: hold the dense model against torch"):
        dense_check = _check_dense(inputs, model) if checked else DenseParity(why=_NO_ROOM)
    metrics["dense_check"] = json_from(dense_check)
    if checked and not section.dense_baseline:
        shutil.rmtree(inputs.output / DENSE)
    text = json.dumps(metrics["dense_check"], indent=1) + "\n"
    (inputs.output / DENSE_CHECK).write_text(text, encoding="utf-8")
    write_configs(model, inputs.output)
    write_tokenizer(load_tokenizer(inputs.source), inputs.output)
    return metrics


def _check_disk(inputs: StageInputs, model: PreTrainedModel, linears: int) -> None:
    """Say what will be written, and refuse where it does not fit.

    Raises:
        EnvironmentFault: if the disk has too little room.
    """
    copies = 2 if inputs.recipe.model.dense_baseline else 1
    needed, free = _bytes_written(model, copies), shutil.disk_usage(inputs.output).free
    inputs.progress.note(
        f"export: {linears} sparse linears; writes up to {needed / 1e9:.2f} GB, "
        f"{free / 1e9:.0f} GB free"
    )
    if not _has_room(inputs, model, copies):
        raise EnvironmentFault(
            f"Export writes up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
            f"{inputs.output}.",
            fix="choose another --work, or leave out the dense model with --no-dense-baseline",
        )


def _bytes_written(model: PreTrainedModel, copies: int) -> int:
    size: int = sum(value.numel() * value.element_size() for value in model.parameters())
    return copies * size


def _has_room(inputs: StageInputs, model: PreTrainedModel, copies: int) -> bool:
    return _bytes_written(model, copies) <= shutil.disk_usage(inputs.output).free


def _check_dense(inputs: StageInputs, model: PreTrainedModel) -> DenseParity:
    """Hold the dense file against torch.

    Raises:
        ModelError: if they differ by more than rounding.
    """
    from nmexport.verification.dense_check import TorchModel, check

    section = inputs.recipe.model
    result = check(
        inputs.output / DENSE / MODEL,
        inputs.output / MODEL,
        TorchModel(
            source=inputs.source,
            dtype=section.dtype,
            offload=inputs.recipe.calibration.offload,
            folder=inputs.output,
        ),
        vocabulary=model.config.get_text_config().vocab_size,
        progress=inputs.progress,
    )
    inputs.progress.note(
        f"export: dense ONNX agrees with torch to {result.error:.1e} "
        f"(rounding in {section.dtype} explains {result.tolerance:g})"
    )
    return result
