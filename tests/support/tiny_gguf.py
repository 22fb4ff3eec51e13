"""A tiny random Llama as a `.gguf`, with a tokenizer, written tensor by tensor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import torch

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """Name in a `.gguf` of a weight of a Llama."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp orders them for its rotary embedding."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def save_tiny_gguf(
    folder: Path,
    path: Path,
    *,
    without: str | None = None,
    extra: dict[str, np.ndarray] | None = None,
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, str | float | bool] | None = None,
    parts: int = 1,
) -> None:
    """Write the tiny Llama in a folder as a `.gguf`, in float32 or in types of GGUF.

    Args:
        folder: What `save_tiny_model` wrote.
        path: The file to write.
        without: A weight to leave out.
        extra: Tensors to add.
        types: Type by a part of a weight's name, such as `Q4_1`; the first part that fits counts.
        metadata: Keys to add; `llama.` stands before each.
        parts: Files to split it into; `path` is then `NAME.gguf`, and they `NAME-00001-of-...`.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    weights = load_file(folder / "model.safetensors")
    most = -(-len(weights) // parts) if parts > 1 else 0  # tensors a file; 0 is no limit
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=most)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add[type(value)](f"llama.{key}", value)
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    tokens += [f"<unused{index}>" for index in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, stored in weights.items():
        if name == without:
            continue
        weight = stored
        if ".q_proj." in name:
            weight = _permuted(stored, config["num_attention_heads"])
        if ".k_proj." in name:
            weight = _permuted(stored, config["num_key_value_heads"])
        values = weight.contiguous().numpy()
        kind = next((kind for part, kind in (types or {}).items() if part in name), "F32")
        if kind == "F32" or values.ndim < 2:
            writer.add_tensor(gguf_name(name), values)
            continue
        raw_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), gguf.quantize(values, raw_type), raw_dtype=raw_type)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
