"""Published configurations of the models that our recipes name: sizes alone, no weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def _sizes(
    family: str,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": _sizes(
        "llama", hidden=4096, inner=11008, layers=32, heads=(32, 32), vocabulary=32000
    ),
    "llama3": _sizes(
        "llama", hidden=4096, inner=14336, layers=32, heads=(32, 8), vocabulary=128256
    ),
    "llama3.2": _sizes(
        *("llama",),
        hidden=2048,
        inner=8192,
        layers=16,
        heads=(32, 8),
        vocabulary=128256,
        tied=True,
        head_dim=64,
    ),
    "mistral": _sizes(
        "mistral", hidden=4096, inner=14336, layers=32, heads=(32, 8), vocabulary=32768
    ),
    "qwen2.5": _sizes(
        "qwen2", hidden=3584, inner=18944, layers=28, heads=(28, 4), vocabulary=152064
    ),
    "qwen3": _sizes(
        *("qwen3",),
        hidden=2560,
        inner=9728,
        layers=36,
        heads=(32, 8),
        vocabulary=151936,
        tied=True,
        head_dim=128,
    ),
    "gemma3": _sizes(
        *("gemma3_text",),
        hidden=1152,
        inner=6912,
        layers=26,
        heads=(4, 1),
        vocabulary=262144,
        tied=True,
        head_dim=256,
    ),
    "phi3": _sizes("phi3", hidden=3072, inner=8192, layers=32, heads=(32, 32), vocabulary=32064),
    "phi4": _sizes("phi3", hidden=5120, inner=17920, layers=40, heads=(40, 10), vocabulary=100352),
    "smollm2": _sizes(
        "llama", hidden=576, inner=1536, layers=30, heads=(9, 3), vocabulary=49152, tied=True
    ),
    "smollm3": _sizes(
        "smollm3", hidden=2048, inner=11008, layers=36, heads=(16, 4), vocabulary=128256, tied=True
    ),
    "granite": _sizes(
        "granite", hidden=2048, inner=8192, layers=40, heads=(32, 8), vocabulary=49155, tied=True
    ),
}
"""By recipe."""
BILLIONS = {
    "llama2": 6.74,
    "llama3": 8.03,
    "llama3.2": 1.24,
    "mistral": 7.25,
    "qwen2.5": 7.62,
    "qwen3": 4.02,
    "gemma3": 1.00,
    "phi3": 3.82,
    "phi4": 14.66,
    "smollm2": 0.1345,
    "smollm3": 3.08,
    "granite": 2.53,
}
"""Parameters, as the models' pages give them."""


def save_config(folder: Path, name: str) -> Path:
    """Write a recipe's `config.json`; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return path
