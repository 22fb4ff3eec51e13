"""Rotary embeddings that depend on the length: the exported graph is transformers' model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from nmexport.models.rotary import frequencies_from_positions

from tests.support.exported import export_folder, load, onnx_logits, torch_logits
from tests.support.tiny import VOCABULARY, save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

SHORT, CONTEXT = 16, 64
_ROPE: dict[str, dict[str, Any]] = {
    "phi3": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": SHORT,
        "short_factor": [1.0 + 0.1 * index for index in range(8)],
        "long_factor": [2.0 + 0.5 * index for index in range(8)],
    },
    "llama": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}


def save(folder: Path, family: str) -> int:
    """Save a tiny model; returns the length after which its frequencies change."""
    options: dict[str, Any] = {"rope_parameters": _ROPE[family]}
    if family == "phi3":
        options |= {
            "max_position_embeddings": CONTEXT,
            "original_max_position_embeddings": SHORT,
        }
    else:
        options["max_position_embeddings"] = SHORT
    save_tiny_model(folder, family, **options)
    return SHORT


@pytest.mark.parametrize("family", _ROPE)
def test_frequencies_follow_the_length(family: str, tmp_path: Path) -> None:
    """In torch: below and beyond the switch, as transformers in a fresh module."""
    switch = save(tmp_path, family)
    for length in (switch - 1, switch, switch + 1, 2 * switch, switch - 4):
        positions = torch.arange(length)[None]
        wanted = load(tmp_path).model.rotary_emb(torch.zeros(1), positions)
        model = load(tmp_path)
        with frequencies_from_positions(model):
            got = model.model.rotary_emb(torch.zeros(1), positions)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert "forward" not in vars(model.model.rotary_emb)


@pytest.mark.parametrize("family", _ROPE)
def test_exported_graph_holds_both_sets(family: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "export"
    output.mkdir()
    switch = save(source, family)
    exported = export_folder(source, output)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, 2 * switch))
    logits = {}
    for length in (switch, switch + 1, 2 * switch):
        part = ids[:, :length]
        ones = np.ones_like(part)
        wanted = torch_logits(load(source), part, ones)  # fresh: transformers' own keep a state
        got = onnx_logits(exported.dense_model, part, ones, prefill=length)
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
        logits[length] = got
    difference = np.abs(logits[switch + 1][:, :switch] - logits[switch])
    assert difference.max() > 0.01, "the frequencies change at the switch"
