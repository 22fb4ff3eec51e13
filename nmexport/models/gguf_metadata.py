"""Compares what transformers reads of a GGUF's metadata with all that they say.

Transformers reads the keys that it knows and passes over the others: scaled rotary embeddings,
partial ones, soft caps and factors of the logits would vanish. So every key of the architecture is
read by transformers, says what the configuration says anyway, or is refused.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nmexport.errors import ModelError
from nmexport.models.integrity import check_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

# Say nothing about what the model computes, or are held against the shapes of its weights.
_WITHOUT_EFFECT = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "pooling_type",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vocab_size",
    }
)
# Further factors of a scaled rotary embedding: without effect where there is none.
_SCALING = "rope.scaling."
_ROUNDING = 1e-5  # GGUF keeps float32


def check_metadata(path: Path, config: PreTrainedConfig) -> None:
    """Refuse a GGUF whose metadata say what transformers does not read.

    Args:
        path: The file, or the first part.
        config: What transformers made of it.

    Raises:
        ModelError: naming the key, what it says, and what would be computed.
    """
    metadata = check_gguf(path).metadata
    architecture = str(metadata.get("general.architecture"))
    prefix = f"{architecture}."
    for name, value in metadata.items():
        key = name.removeprefix(prefix)
        if key == name or key in _WITHOUT_EFFECT or _has_no_scaling(key, metadata, prefix):
            continue
        wanted = _MEANING[key](config) if key in _MEANING else _neutral(value)
        if not _equal(value, wanted):
            raise ModelError(
                f"{path} says {name} = {value}, which transformers does not read: the model would "
                f"be computed with {wanted}.",
                fix="use the model's safetensors",
            )


def _has_no_scaling(key: str, metadata: Mapping[str, Any], prefix: str) -> bool:
    """Tell whether a key is about scaled rotary embeddings, and these are not scaled."""
    if not key.startswith(_SCALING):
        return False
    kind = metadata.get(f"{prefix}{_SCALING}type")
    factor = metadata.get(f"{prefix}{_SCALING}factor", 1.0)
    return kind == "none" or (kind in {None, "linear"} and factor in {0.0, 1.0})


def _neutral(value: Any) -> Any:
    """List the values that an unknown key may have: nothing, in its own type."""
    return "" if isinstance(value, str) else False if isinstance(value, bool) else 0


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, str) or isinstance(wanted, str) or wanted is None:
        return bool(value == wanted)
    return math.isclose(value, wanted, rel_tol=_ROUNDING)


def _head_size(config: PreTrainedConfig) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def _rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the parameters of the rotary embedding; of full attention where layers differ."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return dict(parameters.get("full_attention", parameters))


def _rotary_size(config: PreTrainedConfig) -> int:
    share = _rotary(config).get("partial_rotary_factor")
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(_head_size(config) * share)


def _local_base(config: PreTrainedConfig) -> Any:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("sliding_attention", {}).get("rope_theta")


def _score_factor(config: PreTrainedConfig) -> float:
    scalar = getattr(config, "query_pre_attn_scalar", None) or _head_size(config)
    return float(scalar**-0.5)


def _read_first(*names: str, default: Any = 0) -> Callable[[PreTrainedConfig], Any]:
    """Make a reader of the first of these names that a configuration has."""

    def read(config: PreTrainedConfig) -> Any:
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if value is not None), default)

    return read


_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
_MEANING: Mapping[str, Callable[[PreTrainedConfig], Any]] = MappingProxyType(
    {
        "attention.causal": lambda _: True,
        "attention.key_length": _head_size,
        "attention.layer_norm_epsilon": _read_first(*_EPSILONS),
        "attention.layer_norm_rms_epsilon": _read_first(*_EPSILONS),
        "attention.scale": _score_factor,
        "attention.sliding_window": _read_first("sliding_window"),
        "attention.sliding_window_pattern": _read_first("sliding_window_pattern"),
        "attention.value_length": _head_size,
        "attn_logit_softcapping": _read_first("attn_logit_softcapping"),
        "embedding_scale": lambda _: 1.0,
        "final_logit_softcapping": _read_first("final_logit_softcapping"),
        "logit_scale": lambda _: 1.0,
        "residual_scale": lambda _: 1.0,
        "rope.dimension_count": _rotary_size,
        "rope.freq_base": lambda config: _rotary(config).get("rope_theta"),
        "rope.freq_base_swa": _local_base,
        "rope.scale_linear": lambda _: 1.0,
        "rope.scaling.factor": lambda config: _rotary(config).get("factor", 1.0),
        "rope.scaling.type": lambda config: _rotary(config).get("rope_type"),
        "use_parallel_residual": _read_first("use_parallel_residual", default=False),
    }
)
"""What a configuration says of each key that the format knows."""
