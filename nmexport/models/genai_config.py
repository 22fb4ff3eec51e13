"""`genai_config.json`, which tells onnxruntime-genai what a model's inputs and outputs mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.models.context import context_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GenerationConfig, PreTrainedConfig

    from nmexport.models.tracing import CacheShape

_ENDLESS = 1 << 17  # tokens: the context of a model whose positions have no end


def genai_config(
    config: PreTrainedConfig,
    generation: GenerationConfig | None,
    shapes: Sequence[CacheShape],
    *,
    filename: str,
) -> dict[str, object]:
    """Build the document in the format that onnxruntime-genai reads.

    Args:
        config: The model's config.
        generation: Its generation defaults.
        shapes: What each decoder layer caches.
        filename: The ONNX file's name next to the document.
    """
    text = config.get_text_config()
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": shapes[0].key_size,
        "hidden_size": text.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": len(shapes),
        "num_key_value_heads": shapes[0].heads,
    }
    context = context_of(config) or _ENDLESS
    model = {
        "bos_token_id": text.bos_token_id,
        "context_length": context,
        "decoder": decoder,
        "eos_token_id": _end_tokens(text.eos_token_id, generation),
        "pad_token_id": _pad_token(text, generation),
        "type": text.model_type,
        "vocab_size": text.vocab_size,
    }
    known = {key: value for key, value in model.items() if value is not None}
    return {"model": known, "search": _search(generation, context)}


def _end_tokens(of_config: int | list[int] | None, generation: GenerationConfig | None) -> Any:
    of_generation = None if generation is None else generation.eos_token_id
    return of_config if of_generation is None else of_generation


def _pad_token(config: PreTrainedConfig, generation: GenerationConfig | None) -> int | None:
    """Return the pad token, or else the first end token, as generation does."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = _end_tokens(config.eos_token_id, generation)
    first = ends[0] if isinstance(ends, list) else ends
    return None if first is None else int(first)


def _search(generation: GenerationConfig | None, context_length: int) -> dict[str, object]:
    """Build the sampling defaults; past and present share no buffer, as caches are concatenated."""
    samples = bool(generation is not None and generation.do_sample)
    return {
        "do_sample": samples,
        "max_length": context_length,
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": False,
        "repetition_penalty": _or_default(generation, "repetition_penalty", 1.0),
        "temperature": _or_default(generation, "temperature", 1.0),
        "top_k": _or_default(generation, "top_k", 50) if samples else 1,
        "top_p": _or_default(generation, "top_p", 1.0),
    }


def _or_default(generation: GenerationConfig | None, name: str, default: float) -> Any:
    value = None if generation is None else getattr(generation, name, None)
    return default if value is None else value
