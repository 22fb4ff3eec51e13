"""Text sources, and the one protocol by which text becomes samples of token ids.

A corpus is named by
- `self`: text that the dense model generates itself, so that no data is needed;
- `python`: the manual and source code that come with Python, real text with no data at hand;
- a `.txt` file: the text as it stands, neither detokenised nor normalised;
- a `.jsonl` file: one document a line, `{"text": ...}` or chat `{"messages": [...]}`, which go
  through the tokenizer's chat template;
- a Hub dataset, `NAME` or `NAME:CONFIG`: its `text` (or `messages`) column.

Text is tokenised once, without special tokens, and cut into consecutive windows that do not
overlap. Documents of a `.jsonl` file are joined by the end-of-text token, texts of a Hub dataset by
an empty line (its rows may be lines of one text). Each window starts with the beginning-of-text
token where the model's tokenizer puts one before any text (Llama 2 and 3, Mistral, Gemma; not
SmolLM2 or Qwen), and has the given length with it. Evaluation takes the first windows; calibration
draws windows at random, without replacement, seeded, and where both name one corpus, from what
evaluation leaves. Beside a named corpus, part of the calibration samples is written by the model:
constants that are learned on one kind of text alone serve others worse.

Arrays here are NumPy's: naming or checking a corpus must not cost an import of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nmexport.calibration.python_text import python_text
from nmexport.calibration.text_sources import (
    PYTHON,
    SELF,
    TokenIds,
    is_file,
    kind_of,
    read_bytes,
    token_stream,
)
from nmexport.errors import CorpusError
from nmexport.recipe import CorpusSection

if TYPE_CHECKING:
    from nmexport.recipe import EvaluationSection

Purpose = Literal["calibration", "evaluation", "learning"]
SelfText = Callable[[int, int, int], TokenIds]
"""(samples, length, seed) -> `[samples, length]`, see `nmexport.calibration.self_text`."""

# Counts changes to how a file's bytes become tokens; part of what identifies a corpus.
_READING = "2"
# Calibration windows are drawn from this many times as many of a Hub dataset, which is streamed.
_POOL = 4


@dataclass(frozen=True)
class Samples:
    """Calibration text, `[samples, length]` int64 each, and nothing twice."""

    corpus: TokenIds
    """Windows of the named corpus; none where that is `self`."""
    written: TokenIds
    """Text that the model wrote itself."""
    further: TokenIds
    """Windows of the corpus that only learned constants are learned from."""


def load_samples(
    section: CorpusSection,
    tokenizer: Any,
    self_text: SelfText,
    *,
    seed: int,
    reserved_tokens: int = 0,
    vocabulary: int | None = None,
) -> Samples:
    """Draw or generate the calibration samples.

    Args:
        section: Corpus, how many samples, how long, and the share that the model writes.
        tokenizer: The model's.
        self_text: Generates text; not called where the model's share is none.
        seed: Of the draw, and of the generated text.
        reserved_tokens: Tokens at the start of the corpus that evaluation uses.
        vocabulary: Tokens that the model knows, where that may be fewer than the tokenizer's.

    Raises:
        CorpusError: if the text is missing, malformed, too short for that many samples, or holds a
            token that the model does not know.
        EnvironmentFault: if the hub cannot be reached or the `datasets` package is missing.
    """
    count, length = section.samples, section.length
    own = count if section.corpus == SELF else round(count * section.self_share)
    drawn = np.empty((0, length), dtype=np.int64)
    if own < count:  # first: what is wrong with a corpus is said before the text is generated
        drawn = _draw(
            section,
            count - own,
            tokenizer,
            seed=seed,
            reserved_tokens=reserved_tokens,
            vocabulary=vocabulary,
        )
    written = drawn[:0]
    if own:
        written = self_text(own, length, text_seed(seed, "calibration"))
    return Samples(drawn[: count - own], written, drawn[count - own :])


def _draw(
    section: CorpusSection,
    needed: int,
    tokenizer: Any,
    *,
    seed: int,
    reserved_tokens: int,
    vocabulary: int | None,
) -> TokenIds:
    """Draw windows of the corpus in random order: those needed, and some to learn from."""
    most = needed + section.learning_samples
    wanted = reserved_tokens + (_POOL * needed + section.learning_samples) * section.length
    stream = token_stream(section.corpus, tokenizer, "calibration", wanted)
    _check_known(stream, tokenizer, vocabulary, section.corpus)
    windows = _windows(stream[reserved_tokens:], section.length, _prefix(tokenizer))
    if len(windows) < needed:
        raise _too_short(
            section.corpus, stream.size, needed, section.length, len(windows),
            options=("--calib-samples", "--calib-length"), reserved=reserved_tokens,
        )  # fmt: skip
    return windows[np.random.default_rng(seed).permutation(len(windows))[:most]]


def evaluation_windows(
    section: EvaluationSection,
    tokenizer: Any,
    self_text: SelfText,
    *,
    seed: int,
    vocabulary: int | None = None,
) -> TokenIds:
    """Return the evaluation windows: the first ones of the corpus.

    Text that the model generates for evaluation is never that of calibration with the same seed.

    Args:
        section: Corpus, how many windows, how long.
        tokenizer: The model's.
        self_text: Generates text where the corpus is `self`; else not called.
        seed: Of the generated text.
        vocabulary: As in `load_samples`.

    Returns:
        `[windows, length]` int64.

    Raises:
        CorpusError: as `load_samples`.
        EnvironmentFault: if the hub cannot be reached or the `datasets` package is missing.
    """
    if section.corpus == SELF:
        return self_text(section.windows, section.length, text_seed(seed, "evaluation"))
    return _first_windows(section, tokenizer, vocabulary)


def _first_windows(section: EvaluationSection, tokenizer: Any, vocabulary: int | None) -> TokenIds:
    stream = token_stream(section.corpus, tokenizer, "evaluation", section.windows * section.length)
    _check_known(stream, tokenizer, vocabulary, section.corpus)
    windows = _windows(stream, section.length, _prefix(tokenizer))
    if len(windows) < section.windows:
        raise _too_short(
            section.corpus, stream.size, section.windows, section.length, len(windows),
            options=("--eval-windows", "--eval-length"),
        )  # fmt: skip
    return windows[: section.windows]


def check_samples(
    section: CorpusSection, tokenizer: Any, *, reserved_tokens: int, vocabulary: int | None
) -> None:
    """Read a local file of calibration text, to refuse it before anything else is done.

    Args:
        section: As in `load_samples`, with the other arguments.
        tokenizer: The model's.
        reserved_tokens: Tokens at the start of the corpus that evaluation uses.
        vocabulary: Tokens that the model knows.

    Raises:
        CorpusError: as `load_samples`.
    """
    needed = section.samples - round(section.samples * section.self_share)
    if is_file(section.corpus) and needed:
        _draw(
            section,
            needed,
            tokenizer,
            seed=0,
            reserved_tokens=reserved_tokens,
            vocabulary=vocabulary,
        )


def check_windows(section: EvaluationSection, tokenizer: Any, *, vocabulary: int | None) -> None:
    """Read a local file of evaluation text, to refuse it before anything else is done.

    Args:
        section: As in `evaluation_windows`, with the other arguments.
        tokenizer: The model's.
        vocabulary: Tokens that the model knows.

    Raises:
        CorpusError: as `evaluation_windows`.
    """
    if is_file(section.corpus):
        _first_windows(section, tokenizer, vocabulary)


def protocol(section: CorpusSection | EvaluationSection) -> str:
    """Describe for a report how this corpus becomes windows of token ids."""
    source = {
        "self": "text that the dense model generates itself, sampled at temperature 1 after a "
        "random first token",
        "python": "the manual and source code that come with Python, tokenised once without "
        "special tokens",
        "txt": "the text as it stands, tokenised once without special tokens",
        "jsonl": "one document a line (chat messages through the model's template), joined by the "
        "end-of-text token",
        "hub": "rows joined by an empty line, tokenised once without special tokens",
    }[kind_of(section.corpus)]

    if isinstance(section, CorpusSection):
        count, which = section.samples, "drawn at random without replacement"
    else:
        count, which = section.windows, "the first ones"
    if section.corpus == SELF:
        which = "each generated on its own"
    return (
        f"{section.corpus}: {source}; {count} windows of {section.length} tokens that do not "
        f"overlap, {which}; a window starts with the beginning-of-text token only where the "
        f"model's tokenizer always puts one"
    )


def corpus_identity(corpus: str) -> dict[str, str]:
    """Return what identifies a corpus in a key: its name, and a local file's contents.

    Raises:
        CorpusError: if a local file is missing or its kind is not known.
    """
    if corpus == PYTHON:
        return {"corpus": corpus, "sha256": hashlib.sha256(python_text().encode()).hexdigest()}
    if not is_file(corpus):
        return {"corpus": corpus}
    return {
        "corpus": kind_of(corpus),
        "reading": _READING,
        "sha256": hashlib.sha256(read_bytes(Path(corpus))).hexdigest(),
    }


def text_prefix(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before any text: beginning-of-text, or none."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False).input_ids
    return [int(bos)] if bos is not None and len(ids) > 1 and ids[0] == bos else []


def _prefix(tokenizer: Any) -> TokenIds:
    return np.array(text_prefix(tokenizer), dtype=np.int64)


def text_seed(seed: int, purpose: Purpose) -> int:
    """Derive the seed of generated text; no two purposes share one, whatever the seeds."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:6], "big")


def _windows(stream: TokenIds, length: int, prefix: TokenIds) -> TokenIds:
    """`[tokens]` -> `[windows, length]`, each with the prefix; an incomplete last one is left.

    Where the text has the prefix at the start of a window, as a chat template may write it, that
    is the window's own: it is never there twice.
    """
    body, at = length - prefix.size, 0
    bodies = []
    while at + body <= stream.size:
        if prefix.size and np.array_equal(stream[at : at + prefix.size], prefix):
            at += prefix.size
            continue
        bodies.append(stream[at : at + body])
        at += body
    if not bodies:
        return np.empty((0, length), dtype=np.int64)
    starts = np.broadcast_to(prefix, (len(bodies), prefix.size))
    return np.concatenate([starts, np.stack(bodies)], axis=1)


def _check_known(stream: TokenIds, tokenizer: Any, vocabulary: int | None, corpus: str) -> None:
    """Refuse tokens beyond the model's embedding: a tokenizer may have more than it has rows.

    Raises:
        CorpusError: naming the first of them.
    """
    if vocabulary is None or not stream.size or stream.max() < vocabulary:
        return
    token = int(stream[stream >= vocabulary][0])
    raise CorpusError(
        f"{corpus} holds {tokenizer.convert_ids_to_tokens(token)!r}, token {token}, and the model "
        f"knows {vocabulary} tokens.",
        allowed=f"tokens 0 to {vocabulary - 1}",
        fix="leave it out of the text, or take the tokenizer that belongs to the model",
    )


def _too_short(
    corpus: str,
    found: int,
    count: int,
    length: int,
    available: int,
    *,
    options: tuple[str, str],
    reserved: int = 0,
) -> CorpusError:
    kept = f", of which evaluation uses the first {reserved}" if reserved else ""
    smaller = f"{options[0]} {available} or less, a smaller {options[1]}, or "
    return CorpusError(
        f"{corpus} has {found} tokens{kept}: {available} whole windows of {length} tokens, "
        f"and {count} are needed ({reserved + count * length} tokens).",
        fix=f"use {smaller if available else ''}a longer text, or --calib/--eval-data self",
    )
