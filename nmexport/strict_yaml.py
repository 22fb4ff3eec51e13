"""Reads YAML without its surprises, with line numbers for error messages.

PyYAML reads YAML 1.1, where the pattern `8:16` is the number 496 (base 60), `no` is false and
a key given twice silently loses its first value. This reads plain scalars by the core schema of
YAML 1.2, keeps every other scalar text, and refuses doubled keys, aliases and tags.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from nmexport.errors import RecipeError

_TEXT_TAG = "tag:yaml.org,2002:str"
_TAGS = frozenset({_TEXT_TAG, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}")  # int() itself refuses more
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

Where = tuple[str | int, ...]  # a path of keys and list indices


class _Loader(yaml.SafeLoader):
    """Reads every plain scalar as text, for `_scalar` to resolve."""

    yaml_implicit_resolvers: dict[str, object] = {}  # noqa: RUF012  PyYAML's own declaration


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader would read as another type."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Line ends of other alphabets survive only where they are escaped.
    style = None if _scalar(text) == text and text.isprintable() else '"'
    return dumper.represent_scalar(_TEXT_TAG, text, style=style)


_Dumper.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Document:
    """A parsed YAML text, with the position of each value."""

    value: Any
    lines: dict[Where, int] = field(default_factory=dict)
    """First line, from 1, of the value at each path of keys."""


def read(text: str, name: str) -> Document:
    """Read one document.

    Args:
        text: The YAML.
        name: What to call it in messages.

    Raises:
        RecipeError: with file and line, if it is malformed, doubles a key, or uses aliases or tags.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(
            f"{where}: not YAML: {error.problem}", fix="check indentation, colons and quotes there"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{name} is nested too deeply.") from error
    if node is None:
        return Document(None)
    lines: dict[Where, int] = {}
    return Document(_build(node, (), lines, name, set()), lines)


def write(value: object) -> str:
    """Write JSON values as YAML that `read` returns unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _build(node: yaml.Node, at: Where, lines: dict[Where, int], name: str, seen: set[int]) -> Any:
    line = node.start_mark.line + 1
    lines[at] = line
    if id(node) in seen:
        raise RecipeError(
            f"{name}:{line}: aliases (*name) are not understood.", fix="write the value out"
        )
    if node.tag not in _TAGS:
        raise RecipeError(
            f"{name}:{line}: tags ({node.tag}) are not understood.", fix="write the plain value"
        )
    seen.add(id(node))
    match node:
        case yaml.MappingNode():
            return _mapping(node, at, lines, name, seen)
        case yaml.SequenceNode():
            return [
                _build(item, (*at, index), lines, name, seen)
                for index, item in enumerate(node.value)
            ]
        case yaml.ScalarNode():
            return _scalar(node.value) if node.style is None else node.value
        case _:
            raise RecipeError(f"{name}:{line}: not a key, a list or a value.")


def _mapping(
    node: yaml.MappingNode, at: Where, lines: dict[Where, int], name: str, seen: set[int]
) -> dict[str, object]:
    mapping: dict[str, object] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{name}:{line}: a key must be a word.")
        key = str(key_node.value)
        if key in mapping:
            first = lines[(*at, key)]
            raise RecipeError(
                f"{name}:{line}: the key {key!r} is given twice, first on line {first}.",
                fix="keep one of them",
            )
        mapping[key] = _build(value_node, (*at, key), lines, name, seen)
        lines[(*at, key)] = line
    return mapping


def _scalar(text: str) -> str | int | float | bool | None:
    """Resolve a plain scalar by the core schema of YAML 1.2; anything else is text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text
