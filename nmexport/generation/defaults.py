"""Reads a model's own generation settings: tokens that end a text, and sampling defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError, RequestError
from nmexport.generation.options import GenerationOptions, options_from
from nmexport.generation.tokenizer import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nmexport.generation.tokenizer import Tokenizer

GENERATION = "generation_config.json"
_FILES = (GENERATION, "config.json")


def end_tokens(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Collect the tokens that end a text: the configuration's and the tokenizer's.

    Raises:
        ArtifactError: if a configuration cannot be read, or names what is no token.
    """
    ends = {tokenizer.eos_token_id}
    for name in _FILES:
        ends |= set(token_ids(read_json(folder / name), "eos_token_id", folder / name))
    return frozenset(token for token in ends if token is not None)


def token_ids(
    document: Mapping[str, Any], key: str, path: Path, *, vocabulary: int | None = None
) -> list[int]:
    """Read the token ids under a key, which holds one, several, or none.

    Args:
        document: A model's configuration.
        key: Such as `eos_token_id`.
        path: Where it was read, for messages.
        vocabulary: Tokens that the model knows.

    Raises:
        ArtifactError: if a value is no token of the model.
    """
    value = document.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not whole or token < 0 or (vocabulary is not None and token >= vocabulary):
            last = "" if vocabulary is None else f", at most {vocabulary - 1}"
            raise ArtifactError(
                f"{path}: {key} cannot be {value!r}: {token!r} is no token of this model.",
                allowed=f"a whole number from 0{last}, a list of such, or null",
                fix=f"correct {key} in that file, or remove it",
            )
    return ids


def generation_defaults(folder: Path) -> GenerationOptions:
    """Read the authors' sampling defaults; greedy where they do not ask for sampling.

    Raises:
        ArtifactError: if the file cannot be read, or a value makes no sense; names the file.
    """
    path = folder / GENERATION
    document = read_json(path)
    names = ["repetition_penalty"]
    if document.get("do_sample"):
        document.setdefault("temperature", 1.0)
        names += ["temperature", "top_p", "top_k"]
    given = {name: document[name] for name in names if document.get(name) is not None}
    try:
        return options_from(given)
    except RequestError as error:
        raise ArtifactError(
            f"{path}: {error.problem}",
            allowed=error.allowed,
            fix="correct the value in that file, or remove it",
        ) from error
