"""Checks what a model's files say about text, before anything is calibrated.

What serving needs in the end is asked for at the start: a tokenizer that the `tokenizers` library
runs, a chat template that compiles, sampling defaults that make sense, and token ids that exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nmexport.errors import ArtifactError, ModelError
from nmexport.generation.chat import ChatTemplate
from nmexport.generation.defaults import GENERATION, generation_defaults, token_ids
from nmexport.generation.tokenizer import read_json, vocabulary_size
from nmexport.models.guard import first_line, quiet
from nmexport.models.integrity import is_lfs_pointer, not_readable
from nmexport.models.integrity import read_json as read_model_json

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from nmexport.models.source import ModelSource

_CONFIG = "config.json"
_SENTENCEPIECE = "tokenizer.model"
_WHOLE = ("tokenizer.json", "vocab.txt", "tekken.json", "spiece.model", _SENTENCEPIECE)
_PAIR = ("vocab.json", "merges.txt")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_OBJECTS = (_TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", _TOKENIZER_CONFIG)
_COPY = "copy the tokenizer's files of the model (or of its base model) into the folder"
_CONVERT = (
    "save it once where sentencepiece is installed: "
    "AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL) writes tokenizer.json"
)


def check_tokenizer_files(source: ModelSource) -> None:
    """Refuse a folder without a tokenizer: transformers makes an empty one for some families.

    Raises:
        ModelError: naming what is missing.
    """
    folder = source.folder
    if source.gguf_file is not None or any(folder.glob("tokenization_*.py")):
        return
    _check_side_files(folder)
    if any((folder / name).is_file() for name in _WHOLE):
        return
    missing = [name for name in _PAIR if not (folder / name).is_file()]
    if not missing:
        return
    lacks = "no tokenizer" if len(missing) == len(_PAIR) else f"half a tokenizer: no {missing[0]}"
    raise ModelError(
        f"Model {source.id!r} cannot be loaded: {folder} has {lacks}.",
        allowed="tokenizer.json, or what it can be made from: vocab.json with merges.txt, "
        "vocab.txt, or tokenizer.model",
        fix=_COPY,
    )


def _check_side_files(folder: Path) -> None:
    """Refuse side files that hold no JSON object, and pointers of Git LFS.

    Raises:
        ModelError: naming the file.
    """
    for name in (*_WHOLE, *_PAIR):
        if is_lfs_pointer(folder / name):
            raise not_readable(folder / name)
    for name in _OBJECTS:
        path = folder / name
        if path.is_file() and not isinstance(read_model_json(path), dict):
            raise ModelError(f"{path} holds no JSON object.", fix=_COPY)
    _check_utf8(folder / _TEMPLATES[0])
    path = folder / _TOKENIZER_CONFIG
    longest = read_json(path).get("model_max_length")
    if isinstance(longest, bool) or not isinstance(longest, int | float | None):
        raise ModelError(
            f"{path}: model_max_length cannot be {longest!r}.",
            allowed="a number of tokens, or null",
            fix="correct the value in that file, or remove it",
        )


def _check_utf8(path: Path) -> None:
    try:
        if path.is_file():
            path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path} is not UTF-8 text: byte {error.start}.", fix="convert it to UTF-8"
        ) from error


def explain_unreadable(source: ModelSource) -> ModelError | None:
    """Build the error for a tokenizer that transformers could not read, if its files say why."""
    folder = source.folder
    only = (folder / _SENTENCEPIECE).is_file() and not (folder / "tokenizer.json").is_file()
    if source.gguf_file is not None or not only:
        return None
    return ModelError(
        f"Model {source.id!r} cannot be loaded: its tokenizer is {folder / _SENTENCEPIECE} alone, "
        "which cannot be read here.",
        allowed="tokenizer.json; or tokenizer.model of SentencePiece, with the package "
        "sentencepiece installed",
        fix=f"pip install sentencepiece, or {_CONVERT}",
    )


def check_text_files(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check tokenizer, chat template, sampling defaults and special tokens.

    Raises:
        ModelError: naming the file and the value.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {source.id!r} ({type(tokenizer).__name__}) runs in Python only.",
            allowed="one that the `tokenizers` library runs (tokenizer.json): generation and "
            "serving use it",
            fix="look for a version of the model with tokenizer.json",
        )
    _check_template(source, tokenizer)
    _check_end_token(source, tokenizer)
    try:
        rows = _check_configs(source)
    except ArtifactError as error:
        raise ModelError(error.problem, allowed=error.allowed, fix=error.fix) from error
    if rows is not None:
        _check_special_tokens(source, tokenizer, rows)


def _check_template(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {"default": templates}
    text = named.get("default")
    if text is None:
        return
    try:
        ChatTemplate(text, {})
    except ValueError as error:
        raise ModelError(
            f"The chat template in {_template_file(source)} does not compile: {error}.",
            allowed="a Jinja template",
            fix="correct it, or remove it: the model is then served without chat",
        ) from error


def _check_end_token(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an end of text without an id: the one that transformers invents ends nothing.

    Raises:
        ModelError: naming the token.
    """
    from tokenizers import Tokenizer

    token, vocabulary = tokenizer.eos_token, source.folder / _WHOLE[0]
    if source.gguf_file is not None or token is None or not vocabulary.is_file():
        return
    config = read_json(source.folder / _TOKENIZER_CONFIG).get("added_tokens_decoder")
    added = config.values() if isinstance(config, dict) else ()
    if (
        Tokenizer.from_file(str(vocabulary)).token_to_id(token) is None
        and token not in read_json(source.folder / _OBJECTS[2])
        and not any(isinstance(entry, dict) and entry.get("content") == token for entry in added)
    ):
        raise ModelError(
            f"The tokenizer of {source.id!r} has eos_token {token!r}, which {vocabulary} does not "
            "hold: texts would never end.",
            allowed="a token of the vocabulary",
            fix=f"correct eos_token in {source.folder / _TOKENIZER_CONFIG}, or take the tokenizer "
            "that belongs to these weights",
        )


def _template_file(source: ModelSource) -> Path:
    if source.gguf_file is not None:
        return source.folder / source.gguf_file
    paths = [source.folder / name for name in _TEMPLATES]
    return next((path for path in paths if path.is_file()), source.folder)


def _check_configs(source: ModelSource) -> int | None:
    """Check ids and sampling defaults; return the embedding's rows, where a config says them."""
    if source.gguf_file is not None:
        return None
    folder = source.folder
    config = read_json(folder / _CONFIG)
    rows = vocabulary_size(config)
    text = config.get("text_config")
    documents: list[tuple[Path, dict[str, object]]] = [
        (folder / _CONFIG, config),
        (folder / _CONFIG, text if isinstance(text, dict) else {}),
        (folder / GENERATION, read_json(folder / GENERATION)),
    ]
    for path, document in documents:
        for key in ("eos_token_id", "bos_token_id"):
            token_ids(document, key, path, vocabulary=rows)
    generation_defaults(folder)
    _check_as_transformers_does(folder / GENERATION)
    return rows


def _check_as_transformers_does(path: Path) -> None:
    """Refuse generation settings that transformers would refuse when it loads the model.

    Raises:
        ModelError: naming the file.
    """
    from transformers import GenerationConfig

    if not path.is_file():
        return
    try:
        with quiet():
            GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    except Exception as error:  # it raises what it pleases
        raise ModelError(
            f"{path} is refused by transformers: {first_line(error)}",
            fix="correct it, or remove it: options of sampling then come with each request",
        ) from error


def known_tokens(source: ModelSource) -> int | None:
    """Return how many tokens the model knows; None where its files do not say."""
    return None if source.gguf_file else vocabulary_size(read_json(source.folder / _CONFIG))


def _check_special_tokens(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, rows: int
) -> None:
    """Refuse a tokenizer whose texts begin or end with a token that the embedding lacks.

    Other tokens beyond it are refused where a text holds one.
    """
    for name in ("bos_token", "eos_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and token >= rows:
            raise ModelError(
                f"The tokenizer of {source.id!r} has {name} {getattr(tokenizer, name)!r}, token "
                f"{token}, and the model's embedding has {rows} rows.",
                allowed=f"tokens 0 to {rows - 1}",
                fix="take the tokenizer that belongs to these weights, or resize the model's "
                "embedding (resize_token_embeddings) and save it again",
            )
