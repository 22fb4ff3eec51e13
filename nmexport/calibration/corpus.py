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
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nmexport.calibration.python_text import python_text
from nmexport.errors import CorpusError, EnvironmentFault, RequestError
from nmexport.generation.chat import check_messages
from nmexport.recipe import CorpusSection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nmexport.recipe import EvaluationSection

SELF = "self"
PYTHON = "python"
FORMS = (
    "self (text that the model generates), python (the manual and source code that come with "
    "Python), a .txt file, a .jsonl file with `text` or `messages`, or a Hub dataset NAME or "
    "NAME:CONFIG"
)

Split = Literal["calibration", "evaluation"]
Purpose = Literal["calibration", "evaluation", "learning"]
TokenIds = NDArray[np.int64]
SelfText = Callable[[int, int, int], TokenIds]
"""(samples, length, seed) -> `[samples, length]`, see `nmexport.calibration.self_text`."""

# Preferred splits of a Hub dataset: never evaluate on what calibration saw.
_SPLITS: dict[Split, tuple[str, ...]] = {
    "calibration": ("train", "validation", "test"),
    "evaluation": ("test", "validation", "train"),
}
# Counts changes to how a file's bytes become tokens; part of what identifies a corpus.
_READING = "2"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_NULS = 4  # a null among so many bytes or fewer: half of them are in UTF-16
# Calibration windows are drawn from this many times as many of a Hub dataset, which is streamed.
_POOL = 4
_CHARACTERS_A_TOKEN = 5


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
    """Calibration samples.

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
        drawn = _drawn(
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


def _drawn(
    section: CorpusSection,
    needed: int,
    tokenizer: Any,
    *,
    seed: int,
    reserved_tokens: int,
    vocabulary: int | None,
) -> TokenIds:
    """Windows of the corpus in random order, as many as needed or further ones up to a limit."""
    most = needed + section.learning_samples
    wanted = reserved_tokens + (_POOL * needed + section.learning_samples) * section.length
    stream = _token_stream(section.corpus, tokenizer, "calibration", wanted)
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
    """Evaluation windows: the first ones of the corpus.

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
    stream = _token_stream(
        section.corpus, tokenizer, "evaluation", section.windows * section.length
    )
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
        _drawn(
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


def is_file(corpus: str) -> bool:
    """Tell whether a corpus is a file of this machine.

    Raises:
        CorpusError: if it is missing, or its kind is not known.
    """
    return _kind(corpus) in {"txt", "jsonl"}


def protocol(section: CorpusSection | EvaluationSection) -> str:
    """How this corpus becomes windows of token ids, in words for a report."""
    source = {
        "self": "text that the dense model generates itself, sampled at temperature 1 after a "
        "random first token",
        "python": "the manual and source code that come with Python, tokenised once without "
        "special tokens",
        "txt": "the text as it stands, tokenised once without special tokens",
        "jsonl": "one document a line (chat messages through the model's template), joined by the "
        "end-of-text token",
        "hub": "rows joined by an empty line, tokenised once without special tokens",
    }[_kind(section.corpus)]

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
        "corpus": _kind(corpus),
        "reading": _READING,
        "sha256": hashlib.sha256(_read_bytes(Path(corpus))).hexdigest(),
    }


def text_prefix(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before any text: its beginning-of-text token, or nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", verbose=False).input_ids
    return [int(bos)] if bos is not None and len(ids) > 1 and ids[0] == bos else []


def _prefix(tokenizer: Any) -> TokenIds:
    return np.array(text_prefix(tokenizer), dtype=np.int64)


def text_seed(seed: int, purpose: Purpose) -> int:
    """Seeds of generated text that no two purposes share, whatever the seeds."""
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


def _kind(corpus: str) -> Literal["self", "python", "txt", "jsonl", "hub"]:
    """Raises CorpusError for what is neither a known file nor like a dataset's name."""
    if corpus == SELF:
        return "self"
    if corpus == PYTHON:
        return "python"
    path = Path(corpus)
    suffix = path.suffix.lower()
    if suffix in {".txt", ".jsonl"}:
        if not path.is_file():
            fault = (
                f"{corpus} is no ordinary file" if path.exists() else f"There is no file {corpus}"
            )
            raise CorpusError(f"{fault}.", allowed=FORMS)
        return "txt" if suffix == ".txt" else "jsonl"
    if path.exists() or corpus.startswith((".", "/", "~")) or corpus.count("/") > 1 or not corpus:
        raise CorpusError(f"{corpus!r} is not a corpus that can be read.", allowed=FORMS)
    return "hub"


def _token_stream(corpus: str, tokenizer: Any, split: Split, wanted: int) -> TokenIds:
    """All tokens of a local corpus, or the first `wanted` or somewhat more of a Hub dataset."""
    kind = _kind(corpus)
    if kind == "python":
        return _tokens(tokenizer, python_text())
    if kind == "txt":
        return _tokens(tokenizer, _read_text(Path(corpus)))
    if kind == "jsonl":
        return _joined(tokenizer, _documents(Path(corpus), tokenizer))
    return _hub_tokens(corpus, tokenizer, split, wanted)


def _tokens(tokenizer: Any, text: str) -> TokenIds:
    """Token ids of a text, without special tokens but those that it spells."""
    # verbose: a text longer than the model's context is what is wanted here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array(ids, dtype=np.int64)


def _joined(tokenizer: Any, documents: Iterator[str]) -> TokenIds:
    """Documents one after another, each ended once: a chat template may end its text itself."""
    end, ended = tokenizer.eos_token_id, tokenizer.eos_token
    parts: list[TokenIds] = [np.empty(0, dtype=np.int64)]
    for document in documents:
        parts.append(_tokens(tokenizer, document))
        if end is not None and not document.rstrip().endswith(ended):
            parts.append(np.array([end], dtype=np.int64))
    return np.concatenate(parts)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.", allowed=FORMS) from error


def _read_text(path: Path) -> str:
    content = _read_bytes(path)
    if content.startswith(_UTF16_MARKS) or content.count(0) * _NULS > len(content) > 0:
        raise CorpusError(f"{path} is UTF-16 text, or no text.", fix="convert it to UTF-8")
    try:
        return content.decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text: byte {error.start}.", fix="convert it to UTF-8"
        ) from error


def _documents(path: Path, tokenizer: Any) -> Iterator[str]:
    """Documents of a `.jsonl` file; empty lines do not count.

    Lines end at line feeds alone: JSON may hold other characters that Python calls line ends. Files
    that were joined have a byte-order mark before any of their lines.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        text = line.strip().removeprefix("\ufeff")
        if text:
            yield _document(_parsed(text, f"{path}:{number}"), tokenizer, f"{path}:{number}")


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise CorpusError(f"{where} is nested too deeply.") from error
    except ValueError as error:  # a number of too many digits is one that is no JSONDecodeError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise CorpusError(f"{where} is not JSON: {reason}.") from error


def _document(row: Any, tokenizer: Any, where: str) -> str:
    """One row as text.

    Raises:
        CorpusError: if it has neither `text` nor `messages`, the messages do not fit the model, or
            the text holds half a character.
    """
    text = _text_of(row, tokenizer, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise CorpusError(
            f"{where} holds half a character: {half} without its other half.",
            allowed="text that UTF-8 can spell",
            fix="write the file again from the original text, or leave the document out",
        ) from error
    return text


def _text_of(row: Any, tokenizer: Any, where: str) -> str:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise CorpusError(
            f"{where} has neither text nor messages, but: {_held(row)}.",
            allowed='{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    return _chat_document(row["messages"], tokenizer, where)


def _held(row: Any) -> str:
    """Describe what a row holds in place of text, with the type of what bears the text's name."""
    if not isinstance(row, dict):
        return type(row).__name__
    return ", ".join(
        f"{key} of type {type(row[key]).__name__}" if key in {"text", "messages"} else key
        for key in row
    )


def _chat_document(messages: list[Any], tokenizer: Any, where: str) -> str:
    try:
        check_messages(messages)
    except RequestError as error:
        raise CorpusError(f"{where}: {error.problem}", allowed=error.allowed) from error
    if not tokenizer.chat_template:
        raise CorpusError(
            f"{where} holds chat messages, and this model's tokenizer has no chat template.",
            fix="give plain text, or a chat model",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author
        raise CorpusError(f"{where}: the chat template refuses it: {error}") from error


def _hub_tokens(corpus: str, tokenizer: Any, split: Split, wanted: int) -> TokenIds:
    """Stream rows until their text makes `wanted` tokens, or there are no more."""
    texts: list[str] = []
    characters, enough = 0, wanted * _CHARACTERS_A_TOKEN
    for number, row in enumerate(_hub_rows(corpus, split)):
        texts.append(_document(row, tokenizer, f"{corpus}, row {number}"))
        characters += len(texts[-1])
        if characters >= enough:
            tokens = _tokens(tokenizer, "\n\n".join(texts))
            if tokens.size >= wanted:
                return tokens
            enough *= 2
    return _tokens(tokenizer, "\n\n".join(texts))


def _hub_rows(corpus: str, split: Split) -> Iterator[Any]:
    """Rows of the preferred split, streamed.

    Raises:
        EnvironmentFault: if `datasets` is missing or the hub cannot be reached.
        CorpusError: if there is no such dataset or configuration.
    """
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            f"{corpus!r} names a Hub dataset, and the datasets package is not installed.",
            allowed=FORMS,
            fix="pip install 'nmexport[hub]', or use --calib self and --eval-data self",
        ) from error
    name, _, config = corpus.partition(":")
    try:
        offered = datasets.get_dataset_split_names(name, config or None)
        chosen = next((name for name in _SPLITS[split] if name in offered), offered[0])
        yield from datasets.load_dataset(name, config or None, split=chosen, streaming=True)
    except ValueError as error:
        raise CorpusError(f"Dataset {corpus}: {error}", allowed="NAME or NAME:CONFIG") from error
    except OSError as error:  # connection, time-out, HTTP status, no such dataset
        raise _hub_fault(corpus, error) from error


def _hub_fault(corpus: str, error: OSError) -> CorpusError | EnvironmentFault:
    # `datasets` says "not found" by a subclass of FileNotFoundError, also when it is offline.
    if isinstance(error, FileNotFoundError) and "reach" not in str(error).lower():
        return CorpusError(f"There is no dataset {corpus} on the hub: {error}", allowed=FORMS)
    return EnvironmentFault(
        f"The hub cannot be reached for dataset {corpus}: {error}",
        allowed=FORMS,
        fix="check the network, use a local .txt or .jsonl, or --calib self and --eval-data self",
    )
