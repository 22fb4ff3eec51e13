"""A model's tokenizer and chat template, read from the files next to it; no torch, no transformers.

`tokenizers` is the library that transformers' own tokenizers run on, so token ids are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as RawTokenizer

from nmexport.errors import ArtifactError, RequestError
from nmexport.generation.chat import ChatTemplate
from nmexport.json_reader import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_REBUILD = "run `nmexport export --force`"


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer of an exported model.

        Raises:
            ArtifactError: if there is none that the `tokenizers` library can read, or its chat
                template does not compile.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(
                f"{folder} holds no tokenizer.json.",
                allowed="a tokenizer that the `tokenizers` library can read",
                fix=_REBUILD,
            )
        try:
            self._tokenizer = RawTokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise ArtifactError(f"{path} cannot be read: {error}", fix=_REBUILD) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.longest_token = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        """Bytes of the longest entry, at least as many as of the text that it stands for."""
        self._config = read_json(folder / "tokenizer_config.json")
        longest = self._config.get("model_max_length")
        self.model_max_length = longest if isinstance(longest, int) else None
        """Tokens that the tokenizer's author says the model takes."""
        self._vocabulary_size = vocabulary_size(read_json(folder / "config.json"))
        self._template = self._compile_template(folder)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._id_of("eos_token")

    @property
    def has_chat_template(self) -> bool:
        """Tell whether messages can be rendered."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text as token ids.

        Special tokens are not put in front of a text that begins with the begin token already, as
        one that was rendered from a chat template elsewhere does.

        Raises:
            RequestError: if the text has no UTF-8, or holds a token that the model does not know.
        """
        check_text(text)
        begin = self._special("bos_token")
        begun = begin is not None and text.startswith(begin)
        # A batch of one: unlike `encode` it lets other threads run, and streams go on meanwhile.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens and not begun
        )
        ids: list[int] = encoding.ids
        self._check_known(ids)
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Encode the text that a chat model continues.

        Raises:
            RequestError: as `render` and `encode`.
        """
        return self.encode(self.render(messages), add_special_tokens=False)

    def decode(self, ids: int | Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode token ids, without special tokens."""
        listed = [ids] if isinstance(ids, int) else list(ids)
        text: str = self._tokenizer.decode(listed, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token: int) -> str:
        """Decode one token inside a text, with leading space and special tokens.

        Part of a character is the replacement character.
        """
        alone = self.decode([token], skip_special_tokens=False)
        # Some decoders take the space off a text's first token: it is read from the second.
        return self.decode([token, token], skip_special_tokens=False)[len(alone) :]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render the text that a chat model continues.

        Args:
            messages: Each with `role` and `content`.

        Raises:
            RequestError: if there is no chat template, or it does not take these messages.
        """
        if self._template is None:
            raise RequestError(
                "This model has no chat template.", fix="leave out the chat option: plain text"
            )
        return self._template.render(messages)

    def _check_known(self, ids: Sequence[int]) -> None:
        """Refuse tokens beyond the model's embedding: tokenizers may have more than it has rows.

        Raises:
            RequestError: naming the first of them.
        """
        size = self._vocabulary_size
        unknown = next((token for token in ids if size is not None and token >= size), None)
        if unknown is not None:
            raise RequestError(
                f"The text holds {self._tokenizer.id_to_token(unknown)!r}, token {unknown}, and "
                f"the model knows {size} tokens.",
                allowed=f"tokens 0 to {(size or 0) - 1}",
                fix="leave it out of the text",
            )

    def _id_of(self, name: str) -> int | None:
        text = self._special(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None

    def _compile_template(self, folder: Path) -> ChatTemplate | None:
        """Compile the chat template; None where the model has none."""
        path = folder / "chat_template.jinja"
        source = self._config.get("chat_template")
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        elif isinstance(source, list):  # several, by name: the plain one
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            return None
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        specials = {name: self._special(name) for name in names}
        known = {name: text for name, text in specials.items() if text is not None}
        try:
            return ChatTemplate(source, known)
        except ValueError as error:
            raise ArtifactError(
                f"The chat template in {folder} does not compile: {error}.", fix=_REBUILD
            ) from error


def check_text(text: str) -> None:
    """Refuse text that is not whole characters: JSON and command lines can carry such.

    Raises:
        RequestError: if UTF-8 cannot spell it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text is not UTF-8: character {error.start} is half of one, or a stray byte.",
            allowed="whole characters",
            fix="send it as UTF-8",
        ) from error


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Read the rows of the embedding from a model's `config.json`; None where it has none."""
    text = config.get("text_config", config)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return size if isinstance(size, int) else None


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file; empty where there is no file.

    Raises:
        ArtifactError: if it cannot be read or is no JSON object.
    """
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} holds no JSON object.")
    return document
