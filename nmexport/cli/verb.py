"""Parts of click that all verbs share: values that complete, and options that are given once."""

from __future__ import annotations

import difflib
import os
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Verb(click.Command):
    """A command that refuses an option given twice, where only one of them could count."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words of the command line."""
        # Options that stop the parsing (--help) are read first: they may stand next to anything.
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        once = [
            parameter
            for parameter in order
            if isinstance(parameter, click.Option)
            and not (parameter.multiple or parameter.count or parameter.is_flag)
        ]
        for parameter in once:
            if once.count(parameter) > 1 and not ctx.resilient_parsing:
                raise click.UsageError(
                    f"{parameter.opts[-1]} is given {once.count(parameter)} times; "
                    "only one of them can count.",
                    ctx,
                )
        return super().parse_args(ctx, args)


class VerbFamily(click.Group):
    """A verb with verbs of its own, such as `bench`."""

    command_class = Verb


class OneOf(click.Choice[str]):
    """One of the values of a `Literal`; an unknown one names the nearest."""

    def __init__(
        self, kind: Any, *more: str, removed: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Take the values from a type.

        Args:
            kind: A `Literal` of texts.
            more: Values that stand before them.
            removed: What to say of values that were allowed once.
        """
        super().__init__([*more, *get_args(kind)])
        self._removed = removed

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Say what is allowed, and what was probably meant."""
        del ctx
        choices = [str(choice) for choice in self.choices]
        near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.51)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if str(value) in self._removed:
            what = self._removed[str(value)]
            hint = f" {what[0].upper()}{what[1:]}."
        return f"{str(value)!r} is none of {', '.join(choices)}.{hint}"


class UserPath(click.Path):
    """A path; `~` is expanded here, as a shell leaves it alone in `--work=~/x`."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | bytes | os.PathLike[str]:
        """Expand, then check as click does."""
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111  keeps `./`


class Words(click.ParamType[str]):
    """Text that is checked later, with values that a shell may complete."""

    name = "text"

    def __init__(self, known: Callable[[], Sequence[str]], *, files: bool = False) -> None:
        """Remember what completes.

        Args:
            known: Makes the values; called when a shell asks.
            files: A path is allowed too.
        """
        self._known, self._files = known, files

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Values that begin with what was typed, then files."""
        del ctx, param
        items = [CompletionItem(word) for word in self._known() if word.startswith(incomplete)]
        return [*items, CompletionItem(incomplete, type="file")] if self._files else items


def recipe_names() -> list[str]:
    """List the recipes that come with the package."""
    from nmexport.recipe import names

    return names()
