"""Random models of real shapes, written shard by shard: for memory tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SHAPES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
"""Of Llama-3.2-1B."""
WIDE: dict[str, Any] = {
    **SHAPES,
    "vocab_size": 2048,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "head_dim": 128,
}
"""Two layers as wide as those of Mistral 7B."""


def save_large_model(folder: Path, *, shard_bytes: int = 1 << 29, **shapes: Any) -> int:
    """Write config and bfloat16 weights, at most one shard in memory; returns the parameters."""
    import torch
    from accelerate import init_empty_weights
    from nmexport.store.tensors import ShardedWriter
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES, **shapes})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with init_empty_weights():
        empty = LlamaForCausalLM(config)
    # Parameters without memory are made anew one by one: tied ones would be written twice.
    empty.tie_weights()
    generator = torch.Generator().manual_seed(0)
    parameters = 0
    with ShardedWriter(folder, shard_bytes=shard_bytes) as writer:
        for name, parameter in empty.named_parameters():
            parameters += parameter.numel()
            if parameter.ndim == 1:
                value = torch.ones(parameter.shape)
            else:
                value = torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator)
            writer.add({name: value.to(torch.bfloat16)})
    return parameters
