"""Which class is built from a model's configuration, and which families are refused.

A family is refused before calibration, in one sentence that names its kind: hours later is late to
hear that export cannot take it. Three checks, the cheap ones first: what the configuration says,
what the modules of the empty model are, and how the empty model behaves when one token runs
through it. A family that no test has exported yet is traced on trial too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from nmexport.errors import ModelError
from nmexport.models.integrity import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

ALLOWED = (
    "decoder-only causal language models whose cache holds keys and values, such as llama, "
    "mistral, qwen2, qwen3, gemma2, gemma3_text, phi3 or gpt_neox, and the text part of multimodal "
    "ones, such as gemma3, llava or qwen2_5_vl"
)

EXPORTED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo3"}
)
"""Families that a test exports and runs (`tests/models/test_family_scan.py`).

Any other is traced on trial before calibration."""

# Text parts that have no causal class of their own, and the family whose class computes the same
# from text: their rotary embeddings differ only in how they place images.
_SAME_TEXT_MODEL = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
# A text part's names in the files of a multimodal model, in every form that checkpoints have.
_TEXT_NAMES = re.compile(
    r"(?:model\.)?language_model\.(?P<head>lm_head\..+)"
    r"|(?:model\.)?language_model\.(?:model\.)?(?P<inner>.+)"
    r"|(?P<bare>lm_head\..+)"
    r"|model\.(?P<plain>(?:layers|embed_tokens|norm)\..+)"
)
_RECURRENT_LAYERS = frozenset({"conv", "linear_attention", "hybrid", "hybrid_sliding"})
_RECURRENT_MODULES = re.compile(r"mamba|rwkv|xlstm|recurrent|deltanet|shortconv", re.IGNORECASE)
_CROSS_ATTENTION = frozenset({"encoder_attn", "cross_attn", "crossattention"})
_BOTH_WAYS = (True, "all")  # gemma4 says "vision" of images alone
_EXPERTS = frozenset({"experts", "router", "router_gate", "block_sparse_moe"})


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the language model to build: of a multimodal one, its text part.

    Args:
        config: The configuration that a model's files hold; returned as it is where it is one of a
            language model alone.

    Raises:
        ModelError: if it is one of no causal language model.
    """
    if config.is_encoder_decoder:
        raise family_error(config, "is an encoder-decoder: its decoder attends to another text")
    inner = config.get_text_config(decoder=True)
    if inner is config:
        if not _has_causal_class(config):
            raise family_error(config, "has no causal language model in transformers")
        return config
    plain = _with_causal_class(config, inner)
    # As the whole model takes it: what its text part says of itself does not count.
    plain.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(plain, name, None) is None:
            setattr(plain, name, getattr(config, name, None))
    return plain


def text_name(stored: str) -> str | None:
    """Translate a multimodal model's tensor name to that in its text part's own files.

    Args:
        stored: Name in the files of the whole model.

    Returns:
        The name; None for a tensor of another part.
    """
    match = _TEXT_NAMES.fullmatch(stored)
    if match is None:
        return None
    head = match["head"] or match["bare"]
    return head or f"model.{match['inner'] or match['plain']}"


def is_text_part(config: PreTrainedConfig, folder: Path) -> bool:
    """Tell whether a model is the text part of the multimodal one that a folder holds."""
    document = read_json(folder / "config.json")
    return "text_config" in document and document.get("model_type") != config.model_type


def refuse_kind(model: PreTrainedModel) -> None:
    """Refuse a model of a kind that calibration, folding or export has no place for.

    Args:
        model: The model or its skeleton; only its configuration and modules are looked at.

    Raises:
        ModelError: if it is a mixture of experts, keeps a state that is no cache of keys and
            values, is an encoder or embeds text, or has no linears.
    """
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    if parts & _EXPERTS:
        raise family_error(
            model.config,
            "is a mixture of experts: experts are stored as one tensor and chosen token by token, "
            "which nmexport does not sparsify yet",
        )
    if parts & _CROSS_ATTENTION:
        raise family_error(
            model.config,
            "is the decoder of an encoder-decoder: its layers attend to another text",
        )
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        raise family_error(
            model.config,
            "numbers its positions from its padding token on, which an exported model does not",
        )
    if _is_recurrent(model):
        raise family_error(
            model.config,
            "is a state-space or recurrent model: its layers keep a state of fixed size, not a "
            "cache of keys and values",
        )
    if getattr(model.config, "is_decoder", True) is False and "encoder" in parts:
        raise family_error(
            model.config,
            "is an encoder (is_decoder is false in its config): each token sees those after it",
        )
    if getattr(model.config, "use_bidirectional_attention", None) in _BOTH_WAYS:
        raise family_error(
            model.config,
            "embeds text (use_bidirectional_attention in its config): each token sees those after "
            "it",
        )
    if model.config.model_type == "falcon" and model.config.alibi:
        raise family_error(
            model.config,
            "has linear biases (alibi in its config), which its code adds twice unless torch "
            "computes the attention, as it does not in a trace",
        )
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not [linear for linear in linears if linear is not model.get_output_embeddings()]:
        raise family_error(
            model.config,
            f"keeps its weights in {_matrix_class(model)}, not in torch.nn.Linear",
        )


def family_error(config: Any, reason: str) -> ModelError:
    """Build the error that says why a family cannot be built."""
    return ModelError(
        f"A model of type {config.model_type!r} {reason}.",
        allowed=ALLOWED,
        fix="use a dense model of one of these families",
    )


def _has_causal_class(config: PreTrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _with_causal_class(config: PreTrainedConfig, inner: PreTrainedConfig) -> PreTrainedConfig:
    """Return the text part's configuration as that of a family with a causal class."""
    from transformers import CONFIG_MAPPING

    same = _SAME_TEXT_MODEL.get(inner.model_type)
    if same is None:
        if not _has_causal_class(inner):
            raise family_error(
                config, f"has a text part of type {inner.model_type!r}, which has none"
            )
        return inner
    values = inner.to_dict()
    rotary = dict(values.pop("rope_parameters", None) or {})
    rotary.pop("mrope_section", None)  # of text, all three positions are the same
    rotary.pop("mrope_interleaved", None)
    if rotary.get("rope_type") == "mrope":
        rotary["rope_type"] = "default"
    values.pop("model_type", None)
    plain: PreTrainedConfig = CONFIG_MAPPING[same](**values, rope_parameters=rotary or None)
    return plain


def _is_recurrent(model: PreTrainedModel) -> bool:
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return bool(_RECURRENT_LAYERS.intersection(layers)) or any(
        isinstance(module, nn.Conv1d) or _RECURRENT_MODULES.search(type(module).__name__)
        for module in model.modules()
    )


def _matrix_class(model: PreTrainedModel) -> str:
    """Return the name of the class that most matrices of a model belong to."""
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    owners = [
        type(module).__name__
        for module in model.modules()
        if id(module) not in embeddings
        and any(value.ndim == 2 for value in module.parameters(recurse=False))  # noqa: PLR2004
    ]
    return max(set(owners), key=owners.count, default="no matrices")
