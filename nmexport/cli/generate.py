"""`nmexport generate`: a person's first check of what was built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
from nmexport.cli.output import emit_json, wants_json
from nmexport.cli.prompt import read_prompt
from nmexport.cli.verb import Verb

if TYPE_CHECKING:
    from nmexport.cli.request import Request


@click.command("generate", cls=Verb, short_help="Continue a prompt with the built model.")
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=int, default=128, show_default=True, metavar="COUNT")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 is greedy.",
)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option(
    "--top-k",
    type=int,
    default=0,
    show_default=True,
    help="Sample from the k likeliest tokens; 0 is no limit.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable.")
@click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt.")
@click.option("--dense", is_flag=True, help="Run the dense baseline instead.")
@takes()
@click.pass_context
def generate_command(
    ctx: click.Context,
    *,
    asked: Request,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: tuple[str, ...],
    chat: bool,
    dense: bool,
) -> None:
    """Continue PROMPT with the built model, streamed; without one, read it from stdin."""
    from nmexport.generation.loop import generate
    from nmexport.generation.options import GenerationOptions

    work = asked.existing_work()
    work.require("engine")
    text = read_prompt(prompt)
    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
    )
    pieces = generate(work.root, text, options, chat=chat, dense=dense)
    if wants_json(ctx):
        emit_json({"work": str(work.root), "prompt": text, "text": "".join(pieces)})
        return
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
