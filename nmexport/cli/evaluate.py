"""`nmexport evaluate`: the folded model against the dense one in torch, on one or more devices."""

from __future__ import annotations

import click

from nmexport.cli.options import reading_options, request
from nmexport.cli.output import console, emit_json, figure, progress, table, wants_json

# \b keeps click from joining the lines of a paragraph.
_HELP = """Score the folded model of a work directory against the dense one, in torch.

Needs `nmexport build --to fold`. For several GPUs or machines:

\b
accelerate launch -m nmexport evaluate --work DIR
"""


@click.command("evaluate", short_help="Score the folded model in torch, before export.", help=_HELP)
@reading_options
@click.pass_context
def evaluate_command(ctx: click.Context) -> None:
    from nmexport.evaluation import evaluate, launched
    from nmexport.progress import Silent

    work = request(ctx).existing_work()
    share = launched()
    found = evaluate(work, share, progress=progress() if share.is_main else Silent())
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
