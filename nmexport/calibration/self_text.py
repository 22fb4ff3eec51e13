"""Text that a model generates itself: calibration and evaluation with no data at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmexport.calibration.corpus import text_prefix
from nmexport.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nmexport.calibration.corpus import SelfText, TokenIds
    from nmexport.progress import Progress

# Sequences generated side by side, and what their KV cache may take.
_MAX_BATCH = 32
_CACHE_BYTES = 2 << 30


def self_text(model: Any, tokenizer: Any, *, progress: Progress) -> SelfText:
    """A source of samples for `load_samples` and `evaluation_windows`.

    Each sample starts with the tokenizer's own prefix and a random ordinary token, and goes on as
    the model samples at temperature 1. Where the text ends, another one begins with a random token.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        progress: Counts generated positions.

    Returns:
        A function of (samples, length, seed) that returns int64 `[samples, length]`: the same on
        one machine for the same arguments.
    """

    def generate(samples: int, length: int, seed: int) -> TokenIds:
        sampler = _Sampler(model, tokenizer, seed)
        batch = min(_MAX_BATCH, samples, max(1, _CACHE_BYTES // (length * _cache_bytes(model))))
        counts = [min(batch, samples - first) for first in range(0, samples, batch)]
        done: list[torch.Tensor] = []

        def steps() -> Iterator[None]:
            for count in counts:
                columns: list[torch.Tensor] = []
                for column in sampler.columns(count, length):
                    columns.append(column)
                    yield
                done.append(torch.cat(columns, dim=1))

        for _ in progress.track(steps(), label="generate text", total=length * len(counts)):
            pass
        ids: TokenIds = torch.cat(done).numpy().astype(np.int64)
        return ids

    return generate


class _Sampler:
    """Seeded sampling with a KV cache; draws on the CPU, so that the device does not matter."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(seed)
        self._prefix = text_prefix(tokenizer)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
        self._starts = torch.tensor([i for i in range(vocabulary) if i not in special])
        self._ends = torch.tensor(sorted(_end_ids(model, tokenizer)), dtype=torch.long)
        self._allowed = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
        self._allowed[self._starts] = True
        self._allowed[self._ends] = True

    def columns(self, count: int, length: int) -> Iterator[torch.Tensor]:
        """`length` columns `[count, 1]` of token ids of `count` sequences."""
        prefix = torch.tensor(self._prefix, dtype=torch.long).expand(count, -1)
        yield from (prefix[:, column : column + 1] for column in range(prefix.shape[1]))
        token = self._random_starts(count)
        given, cache = torch.cat([prefix, token], dim=1), None
        yield token
        for _ in range(length - len(self._prefix) - 1):
            logits, cache = self._step(given, cache)
            ended = torch.isin(token, self._ends)
            token = torch.where(ended, self._random_starts(count), self._sample(logits))
            given = token
            yield token

    def _random_starts(self, count: int) -> torch.Tensor:
        drawn = torch.randint(len(self._starts), (count, 1), generator=self._generator)
        return self._starts[drawn]

    def _step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits `[count, V]` float32 of the last position, and the grown cache."""
        with torch.inference_mode():
            output = self._model(
                input_ids=ids.to(self._model.device), past_key_values=cache, use_cache=True
            )
        return output.logits[:, -1].float().cpu(), output.past_key_values

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(
                "The dense model's logits are not finite: it cannot generate its own text.",
                fix="check the weights with the dense model, or use --dtype float32",
            )
        allowed = logits.masked_fill(~self._allowed[: logits.shape[-1]], -torch.inf)
        return torch.multinomial(allowed.softmax(dim=-1), 1, generator=self._generator)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Token ids after which another text begins."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {int(one) for one in (*listed, tokenizer.eos_token_id) if one is not None}


def _cache_bytes(model: Any) -> int:
    """Bytes of KV cache a token."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
