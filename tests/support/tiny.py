"""Tiny random models with a working tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
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
_OTHER_SIZES: dict[str, Any] = {
    **dict.fromkeys(("d_model", "dim_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "dim_ff"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 256),
    "num_experts_per_tok": 2,
}
"""What some families call their sizes, and sizes that only they have."""
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
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_vision": {"mm_embed_dim": 32, "output_proj_dims": 32, "patch_size": 4},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"num_key_value_heads": 4, "per_layer_config": {}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64},
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * 2},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "phi4_multimodal_audio": {"nemo_conv_channels": 16, "num_blocks": 1},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 16],
        "attn_layers": ["local", "local"],
        "is_decoder": True,
    },
    "xlnet": {"d_head": 16},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
}
"""Sizes that must fit the others, of families that no test builds but the scan."""
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


def begin_every_text(folder: Path) -> None:
    """Let the saved tokenizer put <s> before every text, as Llama's and Gemma's do."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(document), encoding="utf-8")


def tiny_config(family: str) -> dict[str, Any]:
    """Fields of a tiny configuration, as the family calls them; its parts' in theirs."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    own = {field.name for field in dataclasses.fields(kind)}
    aliases = dict(kind.attribute_map)
    given = {**_FAMILIES.get(family, {}), **_OWN_SIZES.get(family, {})}
    sizes = {**_SIZES, **_OTHER_SIZES, **given}
    # What two names say is said once, by the common name.
    doubled = {aliases[name] for name in _SIZES if name in aliases}
    found = {
        name: value
        for name, value in sizes.items()
        if (name in own or name in aliases) and name not in doubled
    }
    for name, part in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        family_of_part = getattr(part, "model_type", None)
        if family_of_part in CONFIG_MAPPING:
            found[name] = {
                "model_type": family_of_part,
                **tiny_config(family_of_part),
                **given.get(name, {}),
            }
    return found


def save_tiny_model(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> None:
    """Save a random model of a family (a `model_type` of transformers) and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**tiny_config(family), **overrides})
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
