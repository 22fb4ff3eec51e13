"""`nmexport gate`: check a report against thresholds, for CI."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmexport.cli.options import takes
from nmexport.cli.output import console, emit_json, figure, table, wants_json
from nmexport.cli.verb import UserPath, Verb
from nmexport.errors import GateFailed, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nmexport.cli.request import Request
    from nmexport.recipe import GatesSection
    from nmexport.report.model import GateResult, Report

_THRESHOLDS = {
    "max_perplexity_ratio": "Perplexity, sparse over dense, at most.",
    "max_kl_mean": "Mean KL divergence to dense, at most.",
    "min_top1_agreement": "Share of positions with the dense model's likeliest token, at least.",
    "min_decode_speedup": "Decode speed, sparse over dense, at least.",
    "min_prefill_speedup": "Prefill speed, sparse over dense, at least.",
    "max_peak_rss_bytes": "Peak memory in bytes, at most.",
}
_NOT_GATED = "not gated: no threshold is set"


def _takes_thresholds(function: Callable[..., Any]) -> Any:
    """Add an option for each threshold; the function gets those given as `limits`."""

    @functools.wraps(function)
    def command(**parameters: Any) -> Any:
        given = {name: parameters.pop(name) for name in _THRESHOLDS}
        limits = {name: value for name, value in given.items() if value is not None}
        return function(limits=limits, **parameters)

    declared: Any = command
    for name, about in reversed(_THRESHOLDS.items()):
        kind = click.INT if name.endswith("bytes") else click.FLOAT
        spelled = f"--{name.replace('_', '-')}"
        declared = click.option(spelled, name, type=kind, help=about)(declared)
    return declared


@click.command("gate", cls=Verb, short_help="Check a report against thresholds.")
@click.argument("report", required=False, type=UserPath(path_type=Path))
@_takes_thresholds
@click.option("--strict", is_flag=True, help="Exit 3 if no threshold is set at all.")
@click.option("--junit", type=UserPath(path_type=Path), help="Write JUnit XML here.")
@click.option("--markdown", type=UserPath(path_type=Path), help="Write a Markdown summary here.")
@takes()
@click.pass_context
def gate_command(
    ctx: click.Context,
    *,
    asked: Request,
    report: Path | None,
    limits: dict[str, float],
    strict: bool,
    junit: Path | None,
    markdown: Path | None,
) -> None:
    """Apply thresholds to REPORT (report.json or a work directory); exit 3 where one fails.

    Thresholds given here replace all others. Without any, those of --recipe hold; else those of the
    work directory's recipe; else those that the report was made with.
    """
    from nmexport.report import gates
    from nmexport.report.model import read_report
    from nmexport.store.records import json_from

    path = _report_path(asked, report)
    document = read_report(path)
    results = gates.evaluate(document, _limits(asked, path, document, limits))
    _write(junit, gates.junit_xml(results))
    _write(markdown, gates.markdown(results))
    verdict = gates.verdict(results)
    if wants_json(ctx):
        emit_json(
            {
                "report": str(path),
                "gates": [json_from(result) for result in results],
                "verdict": verdict,
            }
        )
    else:
        _show(results, verdict)
    if verdict == "fail":
        raise GateFailed("; ".join(gate.why or gate.name for gate in results if not gate.passed))
    if not results and strict:
        raise GateFailed(_NOT_GATED)


def _show(results: Sequence[GateResult], verdict: str) -> None:
    rows = [
        (gate.name, f"{gate.limit:g}", figure(gate.value, 4), "pass" if gate.passed else "FAIL")
        for gate in results
    ]
    out = console()
    if rows:
        out.print(table(None, ("gate", "limit", "value", ""), rows))
    out.print(f"Verdict: {verdict}" + ("" if results else f" ({_NOT_GATED})"))


def _report_path(asked: Request, given: Path | None) -> Path:
    if given is not None and asked.work is not None:
        raise click.UsageError("REPORT and --work name two reports; give one of them.")
    root = given if given is not None else asked.existing_work().root
    return root / "report.json" if root.is_dir() else root


def _limits(asked: Request, path: Path, report: Report, given: Mapping[str, float]) -> GatesSection:
    """Return the gates in force: those given as options, or the recipe's, or the report's own."""
    from nmexport.recipe import load
    from nmexport.report.gates import limits_from, limits_of_report
    from nmexport.store.work_directory import RESOLVED

    if given:
        return limits_from(given)
    if asked.file is not None:
        return load(asked.file).gates
    recipe_file = path.parent / RESOLVED
    if recipe_file.is_file():
        gates = load(recipe_file).gates
        if any(limit is not None for _, limit in gates):
            return gates
    return limits_of_report(report)


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}", fix="name another file") from error
