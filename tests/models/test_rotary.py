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


_OTHER_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT
            }
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": SHORT,
            }
        },
    ),
    "proportional": (
        "llama", {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}
    ),
    "dynamic with an original length": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": SHORT
            }
        },
    ),
    "longrope as Phi-3.5 spells it": (
        "phi3",
        {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": _ROPE["phi3"]["short_factor"],
                "long_factor": _ROPE["phi3"]["long_factor"],
            },
            "original_max_position_embeddings": SHORT,
        },
    ),
}  # fmt: skip


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", _OTHER_KINDS)
def test_every_kind_is_exported_as_transformers_computes_it(kind: str, tmp_path: Path) -> None:
    """Below the original length, at it, beyond it, and at the end of the context."""
    source, output = tmp_path / "source", tmp_path / "export"
    output.mkdir()
    family, options = _OTHER_KINDS[kind]
    rotary = options.get("rope_parameters")
    given = {"rope_parameters": {"rope_theta": 10000.0, **rotary}} if rotary else options
    save_tiny_model(source, family, max_position_embeddings=CONTEXT, num_hidden_layers=1, **given)
    exported = export_folder(source, output)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, CONTEXT))
    for length in (SHORT // 2, SHORT, SHORT + 1, CONTEXT):
        part = ids[:, :length]
        ones = np.ones_like(part)
        wanted = torch_logits(load(source), part, ones)
        got = onnx_logits(exported.dense_model, part, ones, prefill=length)
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
