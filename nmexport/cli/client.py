"""`nmexport client`: a first request to a server, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from nmexport.cli.output import emit_json, json_option, verbose_option, wants_json
from nmexport.cli.prompt import read_prompt
from nmexport.cli.verb import Verb

if TYPE_CHECKING:
    from collections.abc import Iterator


@click.command("client", cls=Verb, short_help="Send a prompt to a server, streamed.")
@click.argument("prompt", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--name", help="Model on the server.  [default: the only one]")
@click.option("--max-tokens", type=int, default=128, show_default=True, metavar="COUNT")
@click.option(
    "--temperature", type=float, help="Sampling temperature; 0 is greedy.  [default: the model's]"
)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int, help="Sample from the k likeliest tokens; 0 is no limit.")
@click.option("--repetition-penalty", type=float)
@click.option("--seed", type=int, help="Random seed.  [default: a new one]")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable.")
@click.option("--chat", is_flag=True, help="Apply the model's chat template to the prompt.")
@click.option("--timeout", type=float, default=600.0, show_default=True, metavar="SECONDS")
@json_option
@verbose_option
@click.pass_context
def client_command(
    ctx: click.Context,
    /,
    *,
    prompt: str | None,
    url: str,
    name: str | None,
    stop: tuple[str, ...],
    timeout: float,
    **options: Any,
) -> None:
    """Send PROMPT to a server and print its text as it comes; without one, read it from stdin."""
    from nmexport.serving import client

    text = read_prompt(prompt)
    server = url.rstrip("/")
    fields = {key: value for key, value in options.items() if value is not None}
    if stop:
        fields["stop_words"] = list(stop)
    model = name or client.text_model(server)
    responses = client.stream(server, model, {"text_input": text, **fields}, timeout=timeout)
    if wants_json(ctx):
        emit_json({"url": server, "model": model, "prompt": text, **_gather(responses)})
        return
    _show(responses)


def _show(responses: Iterator[dict[str, Any]]) -> None:
    """Print text as it comes; an error begins on a line of its own."""
    shown = False
    try:
        for response in responses:
            click.echo(response["text_output"], nl=False)
            shown = True
    finally:
        click.echo(nl=shown)


def _gather(responses: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole text, and the usage in the last response."""
    text, last = "", {}
    for last in responses:
        text += last["text_output"]
    counts = {key: last.get(key) for key in ("finish_reason", "prompt_tokens", "completion_tokens")}
    return {"text": text, **counts}
