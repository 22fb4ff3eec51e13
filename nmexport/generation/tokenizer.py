"""A model's tokenizer and chat template, read from the files beside it; no torch, no transformers.

`tokenizers` is the library that transformers' own tokenizers run on, so token ids are the same;
`jinja2` renders the chat template with the settings that templates are written for.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from nmexport.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
"""What a tokenizer may consist of; only the first must be there."""
_ROLES = ("system", "developer", "user", "assistant", "tool")


class ServingTokenizer:
    """Text to token ids and back."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer of an exported model.

        Raises:
            ArtifactError: if there is none that the `tokenizers` library can read.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(
                f"{folder} holds no tokenizer.json.",
                allowed="a tokenizer that the `tokenizers` library can read",
                fix="serve a model with a fast tokenizer",
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.longest_token = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        """Bytes of the longest entry, at least as many as of the text that it stands for."""
        self._config = _json(folder / "tokenizer_config.json")
        self._template = _template(folder, self._config)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end-of-text token."""
        text = self._special("eos_token")
        return None if text is None else self._tokenizer.token_to_id(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Special tokens are not put in front of a text that begins with the begin token already, as
        one that was rendered from a chat template elsewhere does.
        """
        begin = self._special("bos_token")
        begun = begin is not None and text.startswith(begin)
        # A batch of one: unlike `encode` it lets other threads run, and streams go on meanwhile.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens and not begun
        )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that a chat model continues.

        Args:
            messages: Each with `role` and `content`.

        Raises:
            RequestError: if there is no chat template, or it does not take these messages.
        """
        if self._template is None:
            raise RequestError("This model has no chat template.", fix="send text_input alone")
        from jinja2 import TemplateError

        specials = {
            name: self._special(name)
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        try:
            text: str = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **{name: value for name, value in specials.items() if value is not None},
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RequestError(f"The chat template refuses these messages: {error}") from error
        return text

    def _special(self, name: str) -> str | None:
        value = self._config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) else None


def messages_from(text: str) -> list[dict[str, Any]]:
    """Messages of a chat, from their JSON.

    Raises:
        RequestError: if it is not a list of objects with `role` and `content`.
    """
    allowed = 'a JSON list such as [{"role": "user", "content": "Hello"}]'
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise RequestError(f"messages is no JSON: {error}", allowed=allowed) from error
    except RecursionError as error:
        raise RequestError("messages is nested too deeply.", allowed=allowed) from error
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages.", allowed=allowed)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RequestError(f"messages holds {message!r}.", allowed=allowed)
        if message.get("role") not in _ROLES:
            raise RequestError(
                f"messages holds the role {message.get('role')!r}.", allowed=", ".join(_ROLES)
            )
    return messages


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    return document if isinstance(document, dict) else {}


def _template(folder: Path, config: Mapping[str, Any]) -> Any | None:
    """The chat template, compiled; None where the model has none."""
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name: the plain one
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ArtifactError(f"The chat template in {folder} cannot be read: {error}") from error


def _to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as templates mean it; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    """What a template calls to refuse messages."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    """The date that some templates put in front, in local time as they expect."""
    return datetime.now().astimezone().strftime(form)
