"""Tiny random models with a working tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 384
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 16
"""Sliding window of the families that have one."""
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    # Caps low enough to bend the logits of a tiny model.
    "gemma2": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
}
FAMILIES = tuple(_FAMILIES)
"""Every family that export supports, by `model_type`."""
EMPTY_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)
"""A whole GGUF file that holds neither metadata nor tensors."""
_TEXT = (
    "The quick brown fox jumps over the lazy dog.",
    "A model reads weights that meet near-zero activations.",
    "Keep the largest scores of every group, per token.",
)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of VOCABULARY entries, trained on three sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_tiny_model(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> None:
    """Save a random model of a family (a `model_type` of transformers) and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_SIZES, **_FAMILIES.get(family, {}), **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # away from the flat logits of the usual init
                parameter.mul_(3.0)
            elif name.endswith("bias"):  # large, as Qwen2's are: losing one must show
                parameter.normal_(0.0, 2.0)
            else:  # norms, so that no two of them are the same
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
