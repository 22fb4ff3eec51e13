"""Tiny models exported with a plain fold, and how to run them: what the export tests share."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from nmexport.models.loader import load_model
from nmexport.models.source import resolve
from nmexport.models.stored_rows import rounded_rows
from nmexport.models.swap import replace_linears
from nmexport.recipe import ModelSection
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants, SparseLinear
from nmexport.sparsity.pattern import NMPattern
from nmexport.stages.exporting import Stored, trace_model, write_models
from nmexport.store.layers import LayerSpec
from torch import nn

from tests.support.kept import kept

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from nmexport.stages import fold as fold_stage
    from nmexport.stages.exporting import TracedModel
    from transformers import PreTrainedModel

PATTERN = NMPattern(8, 16)
_TINY = 1 << 20
"""Parameters of a model whose export is worth a copy."""


@dataclass(frozen=True)
class Exported:
    """A folder with `model.onnx` and `dense/model.onnx`, and the torch models they stand for."""

    folder: Path
    dense: PreTrainedModel
    sparse: PreTrainedModel
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    """Inputs of each op, by the name of the linear."""

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def dense_model(self) -> Path:
        return self.folder / "dense" / "model.onnx"


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def specs_of(model: nn.Module, behaviour: Behaviour) -> list[LayerSpec]:
    return [
        LayerSpec(
            name=name,
            in_features=linear.in_features,
            out_features=linear.out_features,
            pattern=behaviour.pattern,
            criterion="act",
            phase=behaviour.phase,
            dynamic_shift=behaviour.dynamic_shift,
            variance_correction=behaviour.variance_correction,
            has_bias=linear.bias is not None,
        )
        for name, linear in linears_of(model).items()
    ]


def load(folder: Path, dtype: str = "float32", attention: str = "eager") -> PreTrainedModel:
    return load_model(resolve(ModelSection(id=str(folder))), dtype=dtype, attention=attention)


def export_folder(
    source: Path,
    output: Path,
    *,
    behaviour: Behaviour | None = None,
    constants: Constants | Callable[[torch.nn.Linear], Constants] | None = None,
    dtype: str = "float32",
    traced: TracedModel | None = None,
) -> Exported:
    """Export a model folder, every linear folded the same way, or with constants of its own.

    Equal exports of tiny models are made once a run, and one that is `traced` needs no trace of its
    own: half of the tests' time went there.
    """
    behaviour = behaviour or Behaviour(pattern=PATTERN)
    dense, sparse = load(source, dtype), load(source, dtype)
    folded: dict[str, Mapping[str, torch.Tensor]] = {
        name: fold(
            linear,
            behaviour,
            constants(linear) if callable(constants) else constants or Constants(),
            dtype=dense.dtype,
        )
        for name, linear in linears_of(dense).items()
    }
    specs = specs_of(dense, behaviour)

    def write(folder: Path) -> None:
        graphs = traced or trace_model(dense, list(folded))
        write_models(graphs, specs, folded.__getitem__, folder)

    if traced is None and sum(parameter.numel() for parameter in dense.parameters()) < _TINY:
        kept(_digest(dense, specs, folded), write, output)
    else:
        write(output)
    replace_linears(
        sparse, {name: SparseLinear(behaviour, tensors) for name, tensors in folded.items()}
    )
    return Exported(output, dense, sparse, folded)


def export_stored(artifact: fold_stage.Artifact, section: ModelSection, output: Path) -> None:
    """Export what fold has stored in integers, with the embedding and dense linears that it has."""
    model = load_model(resolve(section))
    traced = trace_model(model, [layer.name for layer in artifact.linears])
    rows = functools.partial(rounded_rows, model, traced.read)
    stored = Stored(rows, artifact.dense_tensors)
    write_models(traced, artifact.linears, artifact.tensors, output, stored=stored)


def _digest(
    dense: PreTrainedModel,
    specs: Sequence[LayerSpec],
    folded: Mapping[str, Mapping[str, torch.Tensor]],
) -> str:
    """Everything that an export is made of; where the model lies is no part of it."""
    digest = hashlib.sha256(repr(specs).encode())
    settings = dense.config.to_dict() | {"_name_or_path": None}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = {"dense": dense.state_dict(), **folded}
    for owner, group in sorted(tensors.items()):
        for name, tensor in sorted(group.items()):
            digest.update(f"{owner} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def onnx_logits(
    path: Path,
    input_ids: np.ndarray,
    attention_mask: np.ndarray,
    *,
    prefill: int,
    library: Path | None = None,
) -> np.ndarray:
    """Logits `[B, S, V]` of a file run on the first `prefill` tokens, then token by token."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    states = {
        item.name: np.zeros((len(input_ids), item.shape[1], 0, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past")
    }
    logits = []
    positions = positions_of(attention_mask)
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, input_ids.shape[1]))]:
        tokens = {
            "input_ids": input_ids[:, start:end],
            "attention_mask": attention_mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        first, *present = session.run(None, {**tokens, **states})
        states = dict(zip(states, present, strict=True))
        logits.append(first)
    return np.concatenate(logits, axis=1)


def torch_logits(
    model: PreTrainedModel, input_ids: np.ndarray, attention_mask: np.ndarray
) -> np.ndarray:
    """Logits `[B, S, V]` of the whole sequence at once, without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            position_ids=torch.from_numpy(positions_of(attention_mask)),
            use_cache=False,
        ).logits
    return logits.float().numpy()


def positions_of(attention_mask: np.ndarray) -> np.ndarray:
    """Position of each token among the real ones; padding has position 0."""
    return np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)
