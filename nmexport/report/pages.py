"""`report.md` and `report.html`: the report for people; the page needs nothing but itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nmexport import progress
from nmexport.report import allocation_rows, learning
from nmexport.report.plots import (
    front_svg,
    latency_svg,
    layer_error_svg,
    layer_sparsity_svg,
    read_share_svg,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jinja2 import Environment as Jinja

VERDICTS = {
    "pass": "All gates passed",
    "fail": "A gate failed",
    "none": "Measured; no gates set",
}
_LEGS = {
    "torch_onnx": "PyTorch and ONNX function bodies",
    "torch_engine": "PyTorch and native op",
    "onnx_engine": "ONNX function bodies and native op",
}
_DENSE = "dense torch, dense ONNX"
_NOISE = "Noise floor: PyTorch against itself, embeddings off by 1e-7"
_EXECUTORS = {
    "torch": "PyTorch",
    "onnx": "ONNX function bodies",
    "engine": "Native op",
}
_NOT_FINITE = "not finite: activations overflow"
_ABSENT = "not measured"
_CACHE_PROTOCOL = (
    "After the last step, the keys and the values of each layer are held against each other: of "
    "each token the norm of the difference over the norm, of all tokens the median, so that a "
    "single choice between nearly equal scores counts for little. The first beyond the tolerance "
    "was computed by what lies before it: layer 0's inputs are the embeddings, layer 5's are what "
    "layer 4 gave."
)


def number(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits, never in powers of ten where people read it."""
    if value is None:
        return _ABSENT
    if value and abs(value) < 10**-digits:
        return f"{value:.2e}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded == int(rounded) and abs(rounded) >= 1 else f"{rounded:,}"


def count(value: int) -> str:
    """A number of things: in full, or in millions and billions."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:,}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share, in percent."""
    return _ABSENT if value is None else f"{100 * value:.{digits}f} %"


def size(value: int | None) -> str:
    """Bytes in the unit people think in."""
    return _ABSENT if value is None else progress.size(value)


def speedup(value: float | None) -> str:
    """`1.52x`."""
    return _ABSENT if value is None else f"{value:.2f}x"


def times(value: float | None) -> str:
    """`1.6x`."""
    return _ABSENT if value is None else f"{number(value, 3)}x"


def interval(ends: Sequence[float] | None) -> str:
    """` (1.41x to 1.53x)`; nothing where it was not measured."""
    return "" if ends is None else f" ({speedup(ends[0])} to {speedup(ends[1])})"


def milliseconds(value: float | None) -> str:
    """`7.12 ms`."""
    return _ABSENT if value is None else f"{number(value, 3)} ms"


def rate(value: float | None) -> str:
    """`140 tokens/s`; nothing where it was not measured: the time says so."""
    return "" if value is None else f"{number(value, 3)} tokens/s"


def compared(words: str, value: float | None) -> str:
    """Return a ratio in words; empty where there is no ratio."""
    return "" if value is None else words


def method(report: dict[str, Any]) -> str:
    """The method in one line."""
    parts = [f"{report['grouping']} groups"]
    allocation = report.get("allocation")
    if allocation is None:
        parts = [report["pattern"], report["criterion"].upper(), *parts]
    else:
        parts = [allocation_rows.chosen_mix(allocation), *parts]
    parts.append(" + ".join(report["mitigations"]) or "no mitigation")
    weights = report["weights"]
    if weights["dense"] != weights["sparse"]:
        parts.append(f"{weights['sparse']} weights against dense {weights['dense']}")
    if report["phases"] == "mixed":
        parts.append("phases by linear")
    elif report["phases"] != "all":
        parts.append(f"{report['phases']} only")
    return ", ".join(parts)


def summary_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """The table that is read first: what, dense, sparse, and the two compared."""
    accuracy, memory = report["accuracy"], report["memory"]
    return [
        _summary_row(
            "Perplexity",
            number(accuracy["dense"]["perplexity"]),
            number(accuracy["sparse"]["perplexity"]),
            change=times(accuracy["perplexity_ratio"]),
            change_more=compared("as high", accuracy["perplexity_ratio"]),
        ),
        _speed_row(report["latency"], "decode", "Decode, batch {batch}, {context} tokens cached"),
        _speed_row(report["latency"], "prefill", "Prefill, {tokens} tokens"),
        _summary_row(
            "Peak memory",
            size(memory["dense"]["peak_rss_bytes"]),
            size(memory["sparse"]["peak_rss_bytes"]),
        ),
    ]


def _speed_row(latency: dict[str, Any], phase: str, what: str) -> dict[str, str]:
    dense, sparse = latency["dense"][phase], latency["sparse"][phase]
    return _summary_row(
        what.format(**dense),
        milliseconds(dense["p50_ms"]),
        milliseconds(sparse["p50_ms"]),
        dense_more=rate(dense["tokens_per_s"]),
        sparse_more=rate(sparse["tokens_per_s"]),
        change=speedup(latency["speedup"][phase]),
        change_more=compared("as fast", latency["speedup"][phase]),
    )


def _summary_row(
    what: str,
    dense: str,
    sparse: str,
    *,
    dense_more: str = "",
    sparse_more: str = "",
    change: str = "",
    change_more: str = "",
) -> dict[str, str]:
    return {
        "what": what,
        "dense": dense,
        "dense_more": dense_more,
        "sparse": sparse,
        "sparse_more": sparse_more,
        "change": change,
        "change_more": change_more,
    }


def parity_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each leg."""
    parity = report["parity"]
    rows = [_parity_row(title, parity[leg]) for leg, title in _LEGS.items()]
    rows = [*_dense_rows(parity.get("dense")), *rows]
    floor = parity["noise_floor"]
    return [*rows, _parity_row(_NOISE, floor)] if floor else rows


def linear_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each executor whose linears were held against the oracle."""
    return [
        _linear_row(title, report["parity"]["linears"][executor])
        for executor, title in _EXECUTORS.items()
    ]


def _linear_row(title: str, figures: dict[str, Any]) -> dict[str, str]:
    if figures["within_contract"] is None:
        return {
            "executor": title,
            "share": _ABSENT,
            "values": "",
            "why": figures.get("why", _NOT_FINITE),
        }
    return {
        "executor": title,
        "share": percent(figures["error_over_tolerance"]),
        "values": f"{count(figures['values'])}, {figures['linears']} linears",
        "why": "",
    }


def _dense_rows(dense: dict[str, Any] | None) -> list[dict[str, str]]:
    """The row of the dense file against torch, which is compared by relative difference."""
    if not dense:
        return []
    empty = dict.fromkeys(("median_abs", "top1", "greedy"), "")
    if dense["error"] is None:
        return [{"pair": _DENSE, "max_abs": _ABSENT, **empty, "why": dense["why"]}]
    return [
        {
            "pair": _DENSE,
            "max_abs": f"{dense['error']:.1e} of its size",
            **empty,
            "greedy": f"{dense['outputs']} outputs, at most {dense['tolerance']:g} allowed",
            "why": "",
        }
    ]


def _parity_row(title: str, leg: dict[str, Any]) -> dict[str, str]:
    if leg["max_abs"] is None:
        empty = dict.fromkeys(("median_abs", "top1", "greedy"), "")
        return {"pair": title, "max_abs": _ABSENT, **empty, "why": leg.get("why", _NOT_FINITE)}
    greedy = (
        f"identical, {leg['prompts']} prompts"
        if leg["greedy_identical"]
        else f"{leg['prompts_diverged']} of {leg['prompts']} prompts differ"
    )
    return {
        "pair": title,
        "max_abs": number(leg["max_abs"], 2),
        "median_abs": number(leg["median_abs"], 2),
        "top1": percent(leg["top1_agreement"], 2),
        "greedy": greedy,
        "why": "",
    }


def task_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each task: both models' scores, the difference, and their standard errors."""
    return [
        {
            "task": name,
            "metric": entry["metric"],
            "n": count(entry["n"]),
            "dense": number(entry["dense"]),
            "dense_error": _error(entry["dense_stderr"]),
            "sparse": number(entry["sparse"]),
            "sparse_error": _error(entry["sparse_stderr"]),
            "difference": number(entry["sparse"] - entry["dense"]),
            "difference_error": _error(entry["difference_stderr"]),
        }
        for name, entry in report["accuracy"]["tasks"].items()
    ]


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f"± {number(stderr, 2)}"


def decode_only_line(report: dict[str, Any]) -> str | None:
    """Decode-only sparsity beside sparsity in all phases, in one line; None where not asked for."""
    decoded, whole = report["accuracy"]["decode_only"], report["accuracy"]["second_half"]
    if decoded is None:
        return None
    if decoded["perplexity_ratio"] is None:
        return f"{_ABSENT}: {decoded.get('why', _NOT_FINITE)}"
    beside = "" if whole is None else f"; in all phases {number(whole['perplexity_ratio'])}"
    return (
        f"perplexity ratio {number(decoded['perplexity_ratio'])}, mean KL "
        f"{number(decoded['kl_mean'])} nats{beside} (the second half of each window, "
        f"{count(decoded['tokens'])} tokens)"
    )


def cache_line(caches: Mapping[str, Any] | None) -> str | None:
    """Say how the caches compare; None for a report that does not compare them."""
    if caches is None:
        return None
    if not caches["layers"]:
        return f"not compared: {caches['why']}"
    allowed = f"{100 * caches['tolerance']:.3g} %"
    first = caches["first_diverging"]
    if first is None:
        worst = max(caches["layers"], key=lambda layer: layer["relative_error"])
        return f"all layers agree within {allowed}; the largest difference is {_diverging(worst)}"
    return f"the first to differ by more than {allowed} is {_diverging(first)}"


def _diverging(layer: Mapping[str, Any]) -> str:
    error = layer["relative_error"]
    by = "whose values are no numbers" if error is None else f"by {100 * error:.2g} %"
    return f"layer {layer['layer']}'s {layer['tensor']}, {by}"


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    return _render("report.md.j2", report)


def html(report: dict[str, Any]) -> str:
    """The report as one page of HTML: no script, no link, plots inline."""
    layers = report["sparsity"]["layers"]
    plots = {
        "errors": layer_error_svg(layers),
        "sparsity": layer_sparsity_svg(layers),
        "prefill": latency_svg(report["latency"], "prefill"),
        "decode": latency_svg(report["latency"], "decode"),
    }
    allocation = report.get("allocation")
    if allocation is not None:
        plots["front"] = front_svg(allocation["front"])
        plots["shares"] = read_share_svg(allocation_rows.read_shares(allocation))
    return _render("report.html.j2", report, plots=plots)


def write(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.html`."""
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")


def _calibration(report: dict[str, Any]) -> dict[str, Any] | None:
    """Collect the part on calibration; None where it would be empty."""
    document = report.get("calibration")
    if document is None:
        return None
    words = learning.words(document)
    return {"words": words, "plots": learning.plots(document)} if any(words.values()) else None


def _render(template: str, report: dict[str, Any], **more: Any) -> str:
    return (
        _jinja()
        .get_template(template)
        .render(
            report=report,
            intervals={
                phase: interval(report["latency"]["speedup"][f"{phase}_interval"])
                for phase in ("prefill", "decode")
            },
            verdict=VERDICTS[report["verdict"]],
            method=method(report),
            summary=summary_rows(report),
            parity=parity_rows(report),
            linears=linear_rows(report),
            caches=cache_line(report["parity"].get("caches")),
            cache_protocol=_CACHE_PROTOCOL,
            tasks=task_rows(report),
            decode_only=decode_only_line(report),
            allocation=allocation_rows.rows(report.get("allocation")),
            calibration=_calibration(report),
            recipe=json.dumps(report["recipe"], indent=1),
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
    jinja.filters.update(number=number, count=count, percent=percent, size=size, speedup=speedup)
    return jinja
