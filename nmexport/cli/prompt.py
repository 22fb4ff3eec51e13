"""Reads the prompt of a verb: from the command line, or all of stdin."""

from __future__ import annotations

import sys

from nmexport.errors import UserError


def read_prompt(given: str | None) -> str:
    """Return the prompt argument, or read stdin.

    Raises:
        UserError: if it is not UTF-8.
    """
    try:
        if given is None:
            return sys.stdin.buffer.read().decode()
        given.encode()  # fails where a word of the command line has stray bytes in it
    except UnicodeError as error:
        raise UserError(
            f"The prompt is not UTF-8: {error}",
            allowed="text in UTF-8",
            fix="convert it, for example with iconv -t UTF-8",
        ) from error
    return given
