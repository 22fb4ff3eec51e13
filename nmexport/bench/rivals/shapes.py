"""The shapes of a decoder, as the configuration next to an exported model names them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a decoder with grouped-query attention and a gated MLP."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def qkv(self) -> int:
        """Outputs of the fused projection to queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def linear_weights(self) -> int:
        """Weights of all linears, the output head included."""
        attention = self.hidden * (self.qkv + self.heads * self.head_size)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.embedding_weights

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding, and as many of the head."""
        return self.vocabulary * self.hidden

    def cache_values(self, batch: int, capacity: int) -> int:
        """Keys and values of `batch` sequences of `capacity` tokens."""
        return 2 * self.layers * batch * self.kv_heads * capacity * self.head_size


def read_shapes(folder: Path) -> Shapes:
    """Read `config.json`.

    Args:
        folder: Of the exported model.

    Raises:
        ArtifactError: if it cannot be read, or names no such sizes.
    """
    path = folder / "config.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = document.get("text_config") or document
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shapes(
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            vocabulary=int(config["vocab_size"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} does not say the shapes of a decoder: {error!r}",
            allowed="hidden_size, num_attention_heads, intermediate_size, num_hidden_layers and "
            "vocab_size",
            fix="run `nmexport export --force`",
        ) from error
