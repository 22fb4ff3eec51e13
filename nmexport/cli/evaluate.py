"""`nmexport evaluate`: the folded model against the dense one in torch, on one or more devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nmexport.cli.options import takes
from nmexport.cli.output import console, emit_json, figure, progress, table, wants_json
from nmexport.cli.recipe_options import EVALUATION_TEXT
from nmexport.cli.verb import Verb

if TYPE_CHECKING:
    from nmexport.cli.request import Request

# \b keeps click from joining the lines of a paragraph.
_HELP = """Score the folded model of a work directory against the dense one, in torch.

Needs `nmexport build --to fold`. The text is what the recipe names, or another: check a model
that was calibrated on one kind of text on others. For several GPUs or machines:

\b
accelerate launch -m nmexport evaluate --work DIR
"""


@click.command(
    "evaluate", cls=Verb, short_help="Score the folded model in torch, before export.", help=_HELP
)
@takes(*EVALUATION_TEXT)
@click.pass_context
def evaluate_command(ctx: click.Context, *, asked: Request) -> None:
    from nmexport.evaluation import evaluate, read_launch
    from nmexport.progress import Silent
    from nmexport.store.records import json_from

    work = asked.existing_work()
    recipe = asked.recipe_on(work)
    share = read_launch()
    shown = progress() if share.is_main else Silent()
    scores = evaluate(work, share, progress=shown, recipe=recipe)
    if scores is None:
        return
    if wants_json(ctx):
        emit_json({"work": str(work.root), "accuracy": json_from(scores)})
        return
    rows = [
        (
            "perplexity",
            figure(scores.dense.perplexity),
            figure(scores.sparse.perplexity),
            figure(scores.perplexity_ratio, 3, "x"),
        ),
        ("KL to dense, mean", "", figure(scores.kl_mean, 4), ""),
        ("top-1 agreement", "", figure(100 * (scores.top1_agreement or 0.0), 1, " %"), ""),
    ]
    title = f"{scores.dataset}, {scores.tokens} tokens, {scores.processes} process(es)"
    console().print(table(title, ("", "dense", "sparse", ""), rows))
