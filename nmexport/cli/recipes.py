"""`nmexport recipes`: list, show, validate."""

from __future__ import annotations

from pathlib import Path

import click

from nmexport.cli.output import console, emit_json, json_option, table, verbose_option, wants_json
from nmexport.cli.verb import UserPath, VerbFamily, Words, recipe_names


@click.group("recipes", cls=VerbFamily)
def recipes_command() -> None:
    """List and show recipes; validate a file."""


@recipes_command.command("list")
@json_option
@verbose_option
@click.pass_context
def list_command(ctx: click.Context) -> None:
    """List the recipes that come with the package; `--model NAME` uses one."""
    from nmexport import recipe

    listed = [
        (name, recipe.load(recipe.path_of(name)), recipe.about(name)) for name in recipe.names()
    ]
    if wants_json(ctx):
        emit_json(
            [
                {
                    "name": name,
                    "model": each.model.id,
                    "pattern": str(each.sparsity.pattern),
                    "about": about,
                }
                for name, each, about in listed
            ]
        )
        return
    rows = [(name, each.model.id, each.sparsity.pattern, about) for name, each, about in listed]
    columns = ("recipe", "model", "pattern", "about")
    console().print(table(None, columns, rows, left=columns))


@recipes_command.command("show")
@click.argument("name", type=Words(recipe_names))
@json_option
@verbose_option
@click.pass_context
def show_command(ctx: click.Context, name: str) -> None:
    """Print the recipe NAME; save it, change it, and build with `--recipe FILE`."""
    from nmexport import recipe

    path = recipe.path_of(name)
    if wants_json(ctx):
        emit_json(recipe.load(path).model_dump(mode="json", by_alias=True))
    else:
        click.echo(path.read_text(encoding="utf-8"), nl=False)


@recipes_command.command("validate")
@click.argument("file", type=UserPath(path_type=Path))
@json_option
@verbose_option
@click.pass_context
def validate_command(ctx: click.Context, file: Path) -> None:
    """Check the recipe in FILE: keys, types, values."""
    from nmexport import recipe

    loaded = recipe.load(file)
    if wants_json(ctx):
        emit_json({"valid": True, "recipe": loaded.model_dump(mode="json", by_alias=True)})
    else:
        sparsity = loaded.sparsity
        console().print(
            f"{file} is valid: {loaded.model.id}, {sparsity.pattern}, {sparsity.criterion}.",
            soft_wrap=True,
            markup=False,
        )
