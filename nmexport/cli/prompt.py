"""The prompt of a verb: a word of the command line, or all of stdin."""

from __future__ import annotations

import click

from nmexport.errors import UserError


def read_prompt(given: str | None) -> str:
    """The prompt that was given, or what stdin holds.

    Raises:
        UserError: if it is not UTF-8.
    """
    if given is not None and given.isascii():
        return given
    try:
        if given is None:
            return click.get_binary_stream("stdin").read().decode()
        given.encode()  # a word that is not UTF-8 came with stray bytes in it
    except UnicodeError as error:
        raise UserError(
            f"The prompt is not UTF-8: {error.reason} at {error.start}."
            if isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
            else f"The prompt is not UTF-8: {error}",
            allowed="text in UTF-8",
            fix="convert it, for example with iconv -t UTF-8",
        ) from error
    return given
