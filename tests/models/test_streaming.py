"""Export without the weights in memory: the same files, and a peak that the model does not set."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from nmexport.errors import ModelError
from nmexport.models.source import resolve
from nmexport.models.streaming import open_for_export
from nmexport.recipe import ModelSection
from nmexport.sparsity.fold import fold
from nmexport.sparsity.linear import Behaviour, Constants
from nmexport.sparsity.pattern import NMPattern
from nmexport.stages import fold as fold_stage
from nmexport.stages.exporting import trace_model, write_configs, write_models
from nmexport.store import tensors as tensors_module
from nmexport.store.layers import Layers, LayerSpec, write_layers
from nmexport.store.tensors import ShardedWriter, TensorReader

from tests.support.exported import PATTERN, export_folder, linears_of, specs_of
from tests.support.large import SHAPES, save_large_model
from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.models.source import ModelSource
    from nmexport.stages.exporting import TracedModel


def source_of(folder: Path) -> ModelSource:
    return resolve(ModelSection(id=str(folder)))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("llama", {}, marks=pytest.mark.slow),
        ("qwen2", {}),
        ("llama", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "biases", "tied"],
)
def test_streamed_files_are_those_of_the_loaded_model(
    tmp_path: Path, family: str, options: dict[str, object]
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    save_tiny_model(source, family, **options)
    for name in ("loaded", "streamed"):
        (tmp_path / name).mkdir()
    loaded = export_folder(source, tmp_path / "loaded")
    write_configs(loaded.dense, tmp_path / "loaded")
    opened = open_for_export(source_of(source), dtype=torch.float32)
    assert opened.streamed
    traced = trace_model(opened.model, list(loaded.tensors), parameter=opened.parameter)
    specs = specs_of(loaded.dense, Behaviour(pattern=PATTERN))
    write_models(traced, specs, loaded.tensors.__getitem__, tmp_path / "streamed")
    write_configs(opened.model, tmp_path / "streamed")
    assert digests(tmp_path / "streamed") == digests(tmp_path / "loaded")


def test_names_that_the_model_does_not_have_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Transformers would load them as well: with random weights, and a warning."""
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    reader = TensorReader(tiny_llama)
    with ShardedWriter(tmp_path) as writer:
        for name in reader.names:
            writer.add({name.replace("model.", "decoder."): reader.read(name)})
    with pytest.raises(ModelError, match=r"decoder\.embed_tokens\.weight"):
        open_for_export(source_of(tmp_path), dtype=torch.float32)


def test_constants_of_a_fold_are_read_one_by_one(
    traced_llama: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = traced_llama.model
    behaviour = Behaviour(pattern=PATTERN, dynamic_shift=True)
    folded, output = tmp_path / "fold", tmp_path / "out"
    folded.mkdir()
    output.mkdir()
    specs = specs_of(model, behaviour)
    with ShardedWriter(folded, shard_bytes=1 << 12) as writer:
        for name, linear in linears_of(model).items():
            tensors = fold(linear, behaviour, Constants(), dtype=torch.float32)
            writer.add({f"{name}.{kind}": tensor for kind, tensor in tensors.items()})
    write_layers(folded, Layers(layers=tuple(specs)))
    opened, reads = [], Counter[str]()
    places, read = tensors_module._places, TensorReader.read
    monkeypatch.setattr(
        tensors_module, "_places", lambda *given: opened.append(given) or places(*given)
    )
    monkeypatch.setattr(
        TensorReader, "read", lambda self, name: reads.update([name]) or read(self, name)
    )
    artifact = fold_stage.Artifact(folded)
    write_models(traced_llama, artifact.layers, artifact.tensors, output, dense_baseline=False)
    assert len(opened) == 1
    names = {f"{layer.name}.{kind}" for layer in specs for kind in artifact.tensors(layer.name)}
    assert set(reads) == names
    assert max(reads.values()) <= 2  # its shape, then its elements


# -- at scale --------------------------------------------------------------------------------------

_LINEARS = (
    ("self_attn.q_proj", "hidden_size", 2048),
    ("self_attn.k_proj", "hidden_size", 512),
    ("self_attn.v_proj", "hidden_size", 512),
    ("self_attn.o_proj", "hidden_size", 2048),
    ("mlp.gate_proj", "hidden_size", 8192),
    ("mlp.up_proj", "hidden_size", 8192),
    ("mlp.down_proj", "intermediate_size", 2048),
)
_EXPORT = """
import json, sys, torch
from pathlib import Path
from nmexport.errors import ModelError
from nmexport.models.source import resolve
from nmexport.models.streaming import open_for_export
from nmexport.progress import peak_rss_bytes
from nmexport.recipe import ModelSection
from nmexport.stages import fold
from nmexport.stages.exporting import trace_model, write_models

source, folded, output = map(Path, sys.argv[1:4])
opened = open_for_export(
    resolve(ModelSection(id=str(source))), dtype=torch.bfloat16
)
artifact = fold.Artifact(folded)
before = peak_rss_bytes()
names = [layer.name for layer in artifact.layers]
traced = trace_model(opened.model, names, parameter=opened.parameter)
write_models(traced, artifact.layers, artifact.tensors, output)
after = peak_rss_bytes()
print(json.dumps({"before": before, "after": after}))
"""


def write_large_fold(source: Path, folder: Path) -> None:
    """Weights turned, and nothing else: what export reads is of the size it has in life."""
    reader = TensorReader(source)
    layers = []
    with ShardedWriter(folder, shard_bytes=1 << 29) as writer:
        for index in range(SHAPES["num_hidden_layers"]):
            for part, width, outputs in _LINEARS:
                name = f"model.layers.{index}.{part}"
                weight = reader.read(f"{name}.weight").t().contiguous()
                writer.add({f"{name}.W": weight})
                layers.append(
                    LayerSpec(
                        name=name,
                        in_features=SHAPES[width],
                        out_features=outputs,
                        pattern=NMPattern(8, 16),
                        criterion="act",
                    )
                )
    write_layers(folder, Layers(layers=tuple(layers)))


@pytest.mark.slow
def test_peak_memory_at_1b_scale(tmp_path: Path) -> None:
    """A copy of the weights would be 2 bytes a parameter, on top of 0.7 GB of libraries.

    What is mapped counts while it is: the largest fused matrix and its parts, some 200 MB here.
    """
    source, folded, output = (tmp_path / name for name in ("model", "fold", "out"))
    for folder in (source, folded, output):
        folder.mkdir()
    parameters = save_large_model(source)
    assert parameters > 1e9
    write_large_fold(source, folded)
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, str(source), str(folded), str(output)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak = json.loads(done.stdout.splitlines()[-1])
    assert peak["after"] / parameters < 1.8
    assert peak["after"] - peak["before"] < 1.2e9
