"""`report.md` and `report.html`: the report for people; the page needs nothing but itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nmexport.report import allocation_rows, learning, rival_rows, stored_rows
from nmexport.report.answer import answer
from nmexport.report.figures import (
    count,
    interval,
    number,
    percent,
    size,
    speedup,
)
from nmexport.report.model import json_of
from nmexport.report.plots import (
    front_svg,
    latency_svg,
    layer_error_svg,
    layer_sparsity_svg,
    read_share_svg,
)
from nmexport.report.rows import (
    cache_line,
    decode_only_line,
    host_lines,
    linear_rows,
    method,
    parity_rows,
    summary_rows,
    task_rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Environment as Jinja

    from nmexport.report.model import (
        Report,
    )

VERDICTS = {
    "pass": "All gates passed",
    "fail": "A gate failed",
    "none": "Measured; no gates set",
}
_CACHE_PROTOCOL = (
    "After the last step, the keys and the values of each layer are held against each other: of "
    "each token the norm of the difference over the norm, of all tokens the median, so that a "
    "single choice between nearly equal scores counts for little. The first beyond the tolerance "
    "was computed by what lies before it: layer 0's inputs are the embeddings, layer 5's are what "
    "layer 4 gave."
)


def markdown(report: Report) -> str:
    """Write the report as Markdown."""
    return _render("report.md.j2", report)


def html(report: Report) -> str:
    """Write the report as one page of HTML: no script, no link, plots inline."""
    layers = report.sparsity.layers
    plots = {
        "errors": layer_error_svg(layers),
        "sparsity": layer_sparsity_svg(layers),
        "prefill": latency_svg(report.latency, "prefill"),
        "decode": latency_svg(report.latency, "decode"),
    }
    if report.allocation is not None:
        plots["front"] = front_svg(report.allocation.front)
        plots["shares"] = read_share_svg(allocation_rows.read_shares(report.allocation))
    return _render("report.html.j2", report, plots=plots)


def files(report: Report) -> dict[str, str]:
    """Return `report.json`, `report.md` and `report.html`: texts by name."""
    text = json.dumps(json_of(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    return {"report.json": text, "report.md": markdown(report), "report.html": html(report)}


def write(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html`."""
    for name, text in files(report).items():
        (folder / name).write_text(text, encoding="utf-8")


def _calibration(report: Report) -> dict[str, object] | None:
    """Collect what the part on calibration prints; None where it would be empty."""
    words = learning.words(report.calibration)
    if not any(words.values()):
        return None
    return {"words": words, "plots": learning.plots(report.calibration)}


def _render(template: str, report: Report, **more: Any) -> str:
    gains = report.latency.speedup
    return (
        _jinja()
        .get_template(template)
        .render(
            report=report,
            intervals={
                "prefill": interval(gains.prefill_interval),
                "decode": interval(gains.decode_interval),
            },
            host_lines=host_lines(report.latency),
            verdict=VERDICTS[report.verdict],
            answer=answer(report),
            method=method(report),
            summary=summary_rows(report),
            stored=stored_rows.rows(report),
            stored_words=stored_rows.words(report),
            examples=stored_rows.example_rows(report),
            rivals=rival_rows.rows(report.rivals),
            rivals_words=rival_rows.words(report.rivals),
            parity=parity_rows(report.parity),
            linears=linear_rows(report.parity),
            caches=cache_line(report.parity.caches),
            cache_protocol=_CACHE_PROTOCOL,
            tasks=task_rows(report),
            decode_only=decode_only_line(report),
            allocation=allocation_rows.rows(report.allocation),
            calibration=_calibration(report),
            recipe=json.dumps(report.recipe, indent=1),
            **more,
        )
    )


def _jinja() -> Jinja:
    import jinja2

    jinja = jinja2.Environment(
        loader=jinja2.PackageLoader("nmexport.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters["code"] = _code
    jinja.filters.update(number=number, count=count, percent=percent, size=size, speedup=speedup)
    return jinja


def _code(text: str) -> Any:
    """Write a sentence as HTML, backquoted parts as code."""
    import markupsafe

    parts = str(markupsafe.escape(text)).split("`")
    marked = [f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts)]
    return markupsafe.Markup("".join(marked))  # noqa: S704  escaped above
