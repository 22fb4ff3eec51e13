"""`nmexport evaluate`: the folded model against the dense one in torch, on one or more devices."""

from __future__ import annotations

import click

from nmexport.cli.options import evaluation_text_options, reading_options, request
from nmexport.cli.output import console, emit_json, figure, progress, table, wants_json

# \b keeps click from joining the lines of a paragraph.
_HELP = """Score the folded model of a work directory against the dense one, in torch.

Needs `nmexport build --to fold`. The text is what the recipe names, or another: a model that was
calibrated on one kind of text should be looked at on others. For several GPUs or machines:

\b
accelerate launch -m nmexport evaluate --work DIR
"""


@click.command("evaluate", short_help="Score the folded model in torch, before export.", help=_HELP)
@reading_options
@evaluation_text_options
@click.pass_context
def evaluate_command(ctx: click.Context) -> None:
    from nmexport.evaluation import evaluate, launched
    from nmexport.progress import Silent

    work = request(ctx).existing_work()
    recipe = request(ctx).recipe_on(work)
    share = launched()
    shown = progress() if share.is_main else Silent()
    found = evaluate(work, share, progress=shown, recipe=recipe)
    if found is None:
        return
    if wants_json(ctx):
        emit_json({"work": str(work.root), "accuracy": found})
        return
    rows = [
        (
            "perplexity",
            figure(found["dense"]["perplexity"]),
            figure(found["sparse"]["perplexity"]),
            figure(found["perplexity_ratio"], 3, "x"),
        ),
        ("KL to dense, mean", "", figure(found["kl_mean"], 4), ""),
        ("top-1 agreement", "", figure(100 * found["top1_agreement"], 1, " %"), ""),
    ]
    title = f"{found['dataset']}, {found['tokens']} tokens, {found['processes']} process(es)"
    console().print(table(title, ("", "dense", "sparse", ""), rows))
