"""Parses JSON from users."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_BYTE_ORDER_MARK = "\ufeff"


def parse_json(
    text: str | bytes, *, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Parse a JSON document; any fault is a ValueError.

    Args:
        text: The document.
        make_object: Builds each object from its keys and values; a dict where None.

    Raises:
        ValueError: if it is no JSON, or is nested too deeply to be read.
    """
    if isinstance(text, str) and text.startswith(_BYTE_ORDER_MARK):
        raise ValueError("it begins with a byte-order mark, which JSON has not")
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
