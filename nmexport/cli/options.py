"""The options that verbs share. A verb names those it takes, and is handed a `Request`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmexport.cli.output import json_option, verbose_option
from nmexport.cli.recipe_options import PATTERN, TARGETS, excluded
from nmexport.cli.request import Request
from nmexport.cli.verb import UserPath, Words, recipe_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from nmexport.cli.recipe_options import RecipeOption


_LOCATORS = (
    click.option(
        "--model",
        "-m",
        type=Words(recipe_names, files=True),
        metavar="NAME|ID|DIR|FILE",
        help="Recipe name (see `nmexport recipes list`), Hub id, local folder, or .gguf file.",
    ),
    click.option(
        "--recipe",
        "recipe_file",
        type=UserPath(path_type=Path),
        metavar="FILE",
        help="Recipe in YAML; options override its keys.",
    ),
    click.option(
        "--work",
        type=UserPath(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Work directory.  [default: nmexport-work/MODEL-NofM]",
    ),
)
_OUTPUT = (json_option, verbose_option)


def takes(*options: RecipeOption, continues: bool = True) -> Callable[[Any], Any]:
    """Give a verb the options that say which build is meant, and some keys of its recipe.

    The verb's function gets all of them as its parameter `asked`. Where a pattern is none of the
    keys, `--pattern` helps to find the work directory, and sets nothing.

    Args:
        options: Those that set keys.
        continues: The recipe is the work directory's, where there is one, whatever the model.
    """
    finds = PATTERN not in options

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def command(**parameters: Any) -> Any:
            given = {option: parameters.pop(option.parameter) for option in options}
            values = {option: option.value(value) for option, value in given.items()}
            targets = next((value for option, value in given.items() if option is TARGETS), ())
            asked = Request(
                model=parameters.pop("model"),
                file=parameters.pop("recipe_file"),
                work=parameters.pop("work"),
                pattern=parameters.pop(PATTERN.parameter) if finds else None,
                continues=continues,
                overrides={
                    option.key: value for option, value in values.items() if value is not None
                },
                spelled={
                    option.key: option.spelled
                    for option, value in values.items()
                    if value is not None
                },
                excludes=excluded(targets),
            )
            return function(asked=asked, **parameters)

        declared: Any = command
        for shared in (*reversed(_OUTPUT), *reversed(_LOCATORS)):
            declared = shared(declared)
        for option in reversed((*options, *((PATTERN,) if finds else ()))):
            declared = option.declare(declared)
        return declared

    return decorate
