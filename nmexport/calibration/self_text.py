"""Text that a model generates itself: calibration and evaluation with no data at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nmexport.calibration.corpus import text_prefix
from nmexport.calibration.products import fast_products
from nmexport.errors import ModelError
from nmexport.models.grouped_attention import grouped_attention
from nmexport.models.growing_cache import growing_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers.cache_utils import DynamicCache

    from nmexport.calibration.corpus import SelfText
    from nmexport.calibration.text_sources import TokenIds
    from nmexport.progress import Progress

# Openings of samples that are not prose: code, a list, headed text.
_OPENINGS = ("```python\nimport", "1. ", "```python\ndef", "# ")
_MARK = "\N{SYMBOL FOR UNIT SEPARATOR}"  # stands for what is said, in a chat template

# Sequences generated side by side, and what their KV cache may take. On a GPU a step takes as long
# for many as for one: more of them, and a share of its memory.
_MAX_BATCH = 128
_CACHE_BYTES = 2 << 30
_DEVICE_BATCH = 512
_DEVICE_SHARE = 8


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a sample begins, and what is said for the model when it stops."""

    name: str
    start: tuple[int, ...] = ()
    """Token ids after the tokenizer's prefix; where there are none, a random ordinary token."""
    turns: tuple[tuple[int, ...], ...] = ()
    """In place of an end of text, by turns: what a chat template puts between two messages."""
    prefixed: bool = True
    """False where the start brings the tokenizer's prefix itself."""


PLAIN = Kind(name="plain")


class _Row:
    """One sample being written."""

    def __init__(self, kind: Kind, prefix: Sequence[int], start: int) -> None:
        self._kind = kind
        self._turn = 0
        self._due = [*(prefix if kind.prefixed else ()), *(kind.start or (start,))]

    def say(self, drawn: int, other: int, ends: set[int]) -> int:
        """Return the next token: one that is due, or the drawn one; `other` begins a new text."""
        if self._due:
            return self._due.pop(0)
        if drawn not in ends:
            return drawn
        if not self._kind.turns:
            self._due = [other]
            return drawn
        first, *self._due = self._kind.turns[self._turn % len(self._kind.turns)]
        self._turn += 1
        return first


def self_text(
    model: Any,
    tokenizer: Any,
    *,
    progress: Progress,
    label: str,
    kinds: Sequence[Kind] = (PLAIN,),
) -> SelfText:
    """Make a source of samples for `load_samples` and `evaluation_windows`.

    A plain sample starts with the tokenizer's own prefix and a random ordinary token, and goes on
    as the model samples at temperature 1. Where the text ends, another one begins with a random
    token; in a chat, the other side's turn.

    Args:
        model: A dense Hugging Face causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        progress: Counts generated positions.
        label: What it counts them under.
        kinds: How samples begin, in turn.

    Returns:
        A function of (samples, length, seed) that returns int64 `[samples, length]`: the same on
        one machine for the same arguments.
    """

    def generate(samples: int, length: int, seed: int) -> TokenIds:
        sampler = _Sampler(model, tokenizer, seed)
        known = _sayable(kinds, model.config.get_text_config().vocab_size)
        rows = [known[row % len(known)] for row in range(samples)]
        done: list[torch.Tensor] = []

        def steps(batches: Sequence[Sequence[Kind]], dtype: torch.dtype) -> Iterator[None]:
            for kinds_of_batch in batches:
                columns: list[torch.Tensor] = []
                for column in sampler.columns(kinds_of_batch, length, dtype):
                    columns.append(column)
                    yield
                done.append(torch.cat(columns, dim=1))

        with fast_products(model) as fast, grouped_attention(model) as in_any_type:
            # Text needs no more digits in what is attended to than in products.
            dtype = fast if in_any_type else model.dtype
            most, room = _batch_limits(model.device)
            fitting = max(1, room // (length * _cache_bytes(model, dtype)))
            batch = min(most, samples, fitting)
            batches = [rows[first : first + batch] for first in range(0, samples, batch)]
            total = length * len(batches)
            for _ in progress.track(steps(batches, dtype), label=label, total=total):
                pass
        ids: TokenIds = torch.cat(done).numpy().astype(np.int64)
        return ids

    return generate


def mixed_self_text(model: Any, tokenizer: Any, *, progress: Progress, label: str) -> SelfText:
    """Make a source of several kinds in turn, to calibrate on.

    Args:
        model: As in `self_text`.
        tokenizer: Its tokenizer.
        progress: Counts generated positions.
        label: What it counts them under.
    """
    kinds = several_kinds(tokenizer)
    return self_text(model, tokenizer, progress=progress, label=label, kinds=kinds)


def several_kinds(tokenizer: Any) -> list[Kind]:
    """List the kinds: plain text, code, lists, and a chat where the tokenizer has a template.

    Constants learned on one kind of text alone serve others worse.
    """
    opened = [
        Kind(
            name="code",
            start=tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids),
        )
        for text in _OPENINGS
    ]
    chat = _chat(tokenizer)
    turns = [[PLAIN, opening] if chat is None else [PLAIN, chat, opening] for opening in opened]
    return [kind for turn in turns for kind in turn]


def _sayable(kinds: Sequence[Kind], vocabulary: int) -> Sequence[Kind]:
    """Keep the kinds whose tokens all have a row in the embedding; templates may use others."""
    known = [
        kind
        for kind in kinds
        if all(token < vocabulary for part in (kind.start, *kind.turns) for token in part)
    ]
    return known or (PLAIN,)


def _chat(tokenizer: Any) -> Kind | None:
    """Return the template's words around a conversation's turns."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": _MARK} for role in roles]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # noqa: BLE001 - a template is a program of the model's author
        return None
    pieces = rendered.split(_MARK)
    if len(pieces) != len(roles) + 1:
        return None  # it changes what is said
    start, answer, question, _ = (
        tuple(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
        for piece in pieces
    )
    return Kind(name="chat", start=start, turns=(answer, question), prefixed=False)


class _Sampler:
    """Seeded sampling with a KV cache; draws on the CPU, so that the device does not matter."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self._model = model
        self._generator = torch.Generator().manual_seed(seed)
        self._prefix = text_prefix(tokenizer)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
        self._starts = torch.tensor([i for i in range(vocabulary) if i not in special])
        self._ends = _end_ids(model, tokenizer)
        self._allowed = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool)
        self._allowed[self._starts] = True
        self._allowed[sorted(self._ends)] = True
        self._buffers = torch.empty(0), torch.empty(0)

    def columns(
        self, kinds: Sequence[Kind], length: int, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """Yield `length` columns `[rows, 1]` of token ids, a row a kind; caches are in `dtype`."""
        starts = self._random_starts(len(kinds)).flatten().tolist()
        rows = [_Row(kind, self._prefix, start) for kind, start in zip(kinds, starts, strict=True)]
        token, cache = self._next(rows, None), growing_cache(self._model, length, dtype=dtype)
        yield token
        for _ in range(length - 1):
            logits = self._step(token, cache)
            token = self._next(rows, logits)
            yield token

    def _next(self, rows: Sequence[_Row], logits: torch.Tensor | None) -> torch.Tensor:
        """Choose each row's next token: the forced one, or the sampled one."""
        sampled = self._random_starts(len(rows)) if logits is None else self._sample(logits)
        others = self._random_starts(len(rows)).flatten().tolist()
        drawn = zip(rows, sampled.flatten().tolist(), others, strict=True)
        said = [row.say(token, other, self._ends) for row, token, other in drawn]
        return torch.tensor(said).unsqueeze(1)

    def _random_starts(self, count: int) -> torch.Tensor:
        drawn = torch.randint(len(self._starts), (count, 1), generator=self._generator)
        return self._starts[drawn]

    def _step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Compute the logits `[count, V]` float32 of the last position; the cache grows."""
        with torch.inference_mode():
            output = self._model(
                input_ids=ids.to(self._model.device), past_key_values=cache, use_cache=True
            )
        logits: torch.Tensor = output.logits[:, -1].float().cpu()
        return logits

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw a token a row of `[rows, V]`, by the inverse of the distribution function.

        One random number a row: `torch.multinomial` draws one for every token of the vocabulary,
        which takes as long as the model's own work.
        """
        cumulative = self._cumulative(logits)
        total = cumulative[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise ModelError(
                "The dense model's logits are not finite: it cannot generate its own text.",
                fix="check the weights with the dense model, or use --dtype float32",
            )
        drawn = total * torch.rand(len(logits), 1, generator=self._generator)
        below = torch.nextafter(total, torch.zeros_like(total))  # the product may round to total
        return torch.searchsorted(cumulative, torch.minimum(drawn, below), right=True)

    def _cumulative(self, logits: torch.Tensor) -> torch.Tensor:
        """Distribution functions `[rows, V]` of what is allowed; they last until the next call.

        In the same memory each time: new memory of this size comes from the system page by page,
        which takes longer than what is computed in it.
        """
        if self._buffers[0].shape != logits.shape:
            self._buffers = torch.empty_like(logits), torch.empty_like(logits)
        first, second = self._buffers
        first.copy_(logits).masked_fill_(~self._allowed[: logits.shape[-1]], -torch.inf)
        torch.softmax(first, dim=-1, out=second)
        return torch.cumsum(second, dim=-1, out=first)


def _batch_limits(device: torch.device) -> tuple[int, int]:
    """Return the most sequences in a batch and their cache bytes, equal on equal machines."""
    if device.type != "cuda":
        return _MAX_BATCH, _CACHE_BYTES
    whole = torch.cuda.get_device_properties(device).total_memory
    return _DEVICE_BATCH, max(_CACHE_BYTES, whole // _DEVICE_SHARE)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the token ids after which another text begins."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _cache_bytes(model: Any, dtype: torch.dtype) -> int:
    """Return the bytes of KV cache a token takes."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * dtype.itemsize)
