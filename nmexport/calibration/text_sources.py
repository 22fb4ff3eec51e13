"""Reads text sources, from the name of a corpus to its tokens.

`nmexport.calibration.corpus` says what may be named and cuts the tokens into windows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nmexport.calibration.python_text import python_text
from nmexport.errors import CorpusError, EnvironmentFault, RequestError
from nmexport.generation.chat import check_messages

if TYPE_CHECKING:
    from collections.abc import Iterator

SELF = "self"
PYTHON = "python"
FORMS = (
    "self (text that the model generates), python (the manual and source code that come with "
    "Python), a .txt file, a .jsonl file with `text` or `messages`, or a Hub dataset NAME or "
    "NAME:CONFIG"
)
Split = Literal["calibration", "evaluation"]
TokenIds = NDArray[np.int64]
# Preferred splits of a Hub dataset: never evaluate on what calibration saw.
_SPLITS: dict[Split, tuple[str, ...]] = {
    "calibration": ("train", "validation", "test"),
    "evaluation": ("test", "validation", "train"),
}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_NULS = 4  # a null among so many bytes or fewer: half of them are in UTF-16
_CHARACTERS_A_TOKEN = 5


def is_file(corpus: str) -> bool:
    """Tell whether a corpus is a file of this machine.

    Raises:
        CorpusError: if it is missing, or its kind is not known.
    """
    return kind_of(corpus) in {"txt", "jsonl"}


def kind_of(corpus: str) -> Literal["self", "python", "txt", "jsonl", "hub"]:
    """Return the kind of a corpus.

    Raises:
        CorpusError: if it is neither a known file nor looks like a dataset's name.
    """
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


def token_stream(corpus: str, tokenizer: Any, split: Split, wanted: int) -> TokenIds:
    """Return all tokens of a local corpus, or at least the first `wanted` of a Hub dataset."""
    kind = kind_of(corpus)
    if kind == "python":
        return _tokens(tokenizer, python_text())
    if kind == "txt":
        return _tokens(tokenizer, _read_text(Path(corpus)))
    if kind == "jsonl":
        return _join(tokenizer, _documents(Path(corpus), tokenizer))
    return _hub_tokens(corpus, tokenizer, split, wanted)


def _tokens(tokenizer: Any, text: str) -> TokenIds:
    """Tokenise a text; special tokens appear only where the text spells them."""
    # verbose: a text longer than the model's context is what is wanted here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return np.array(ids, dtype=np.int64)


def _join(tokenizer: Any, documents: Iterator[str]) -> TokenIds:
    """Join documents, each ended once: a chat template may end its text itself."""
    end, ended = tokenizer.eos_token_id, tokenizer.eos_token
    parts: list[TokenIds] = [np.empty(0, dtype=np.int64)]
    for document in documents:
        parts.append(_tokens(tokenizer, document))
        if end is not None and not document.rstrip().endswith(ended):
            parts.append(np.array([end], dtype=np.int64))
    return np.concatenate(parts)


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.", allowed=FORMS) from error


def _read_text(path: Path) -> str:
    content = read_bytes(path)
    if content.startswith(_UTF16_MARKS) or content.count(0) * _NULS > len(content) > 0:
        raise CorpusError(f"{path} is UTF-16 text, or no text.", fix="convert it to UTF-8")
    try:
        return content.decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text: byte {error.start}.", fix="convert it to UTF-8"
        ) from error


def _documents(path: Path, tokenizer: Any) -> Iterator[str]:
    """Read the documents of a `.jsonl` file; empty lines do not count.

    Lines end at line feeds alone: JSON may hold other characters that Python calls line ends. Files
    that were joined have a byte-order mark before any of their lines.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        text = line.strip().removeprefix("\ufeff")
        if text:
            yield _document(_parse(text, f"{path}:{number}"), tokenizer, f"{path}:{number}")


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError as error:
        raise CorpusError(f"{where} is nested too deeply.") from error
    except ValueError as error:  # a number of too many digits is one that is no JSONDecodeError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise CorpusError(f"{where} is not JSON: {reason}.") from error


def _document(row: Any, tokenizer: Any, where: str) -> str:
    """Return one row as text.

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
            f"{where} has neither text nor messages, but: {_describe_row(row)}.",
            allowed='{"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}',
        )
    return _chat_document(row["messages"], tokenizer, where)


def _describe_row(row: Any) -> str:
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
    """Stream the rows of the preferred split.

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
