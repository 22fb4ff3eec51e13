"""Chat messages, and the template that turns them into the text that a model continues."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nmexport.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2.parser import Parser

ROLES = ("system", "developer", "user", "assistant", "tool")
_EXAMPLE = 'a JSON list such as [{"role": "user", "content": "Hello"}]'


class ChatTemplate:
    """A compiled template, with the settings that templates are written for."""

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        """Compile the template.

        Args:
            source: The template, in Jinja.
            specials: Special tokens by name (`bos_token` and so on) that it may use.

        Raises:
            ValueError: if it does not compile; says why.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _format_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from error
        except Exception as error:  # deep nesting, a constant that cannot be computed
            raise ValueError(str(error) or type(error).__name__) from error
        self._specials = dict(specials)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render the text that a chat model continues after these messages.

        Raises:
            RequestError: if the template does not take them.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._specials,
            )
        except Exception as error:  # a template is a program of the model's author
            reason = str(error) or type(error).__name__
            raise RequestError(f"The chat template refuses these messages: {reason}") from error


class _GenerationTag(Extension):
    """`{% generation %}`: marks what the model says, for training; the text stays as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja's own type

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def messages_from(text: str) -> list[dict[str, object]]:
    """Read the messages of a chat from their JSON.

    Raises:
        RequestError: if it is not a list of messages with a known role.
    """
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise RequestError(f"messages is no JSON: {error}", allowed=_EXAMPLE) from error
    except RecursionError as error:
        raise RequestError("messages is nested too deeply.", allowed=_EXAMPLE) from error
    check_messages(messages)
    for message in messages:
        if message.get("role") not in ROLES:
            raise RequestError(
                f"messages holds the role {message.get('role')!r}.", allowed=", ".join(ROLES)
            )
    checked: list[dict[str, object]] = messages
    return checked


def check_messages(messages: object) -> None:
    """Check that every message's content is text.

    Content in parts (text, images) is refused: most templates would write out its Python form.

    Raises:
        RequestError: if it is no list of objects whose `content` is text.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages.", allowed=_EXAMPLE)
    for message in messages:
        if not isinstance(message, dict) or not _has_text(message):
            raise RequestError(
                f"messages holds {message!r}.", allowed=f"{_EXAMPLE}: content is text"
            )


def _has_text(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _to_json(value: Any, *, indent: int | None = None, **options: Any) -> str:
    """Write JSON as templates mean it; jinja's own filter escapes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})


def _refuse(message: str) -> None:
    """Refuse messages, when a template calls it."""
    raise jinja2.TemplateError(message)


def _format_now(form: str) -> str:
    """Format the date that some templates put in front, in local time as they expect."""
    return datetime.now().astimezone().strftime(form)
