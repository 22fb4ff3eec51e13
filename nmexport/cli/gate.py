"""`nmexport gate`: hold a report against thresholds, for CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nmexport.cli.options import reading_options, request
from nmexport.cli.output import console, emit_json, figure, table, wants_json

_THRESHOLDS = {
    "max_perplexity_ratio": "Perplexity, sparse over dense, at most.",
    "max_kl_mean": "Mean KL divergence to dense, at most.",
    "min_top1_agreement": "Share of positions with the dense model's likeliest token, at least.",
    "min_decode_speedup": "Decode speed, sparse over dense, at least.",
    "min_prefill_speedup": "Prefill speed, sparse over dense, at least.",
    "max_peak_rss_bytes": "Peak memory in bytes, at most.",
}
_LIMITS = "nmexport.limits"


def _threshold_options(command: Any) -> Any:
    def keep(ctx: click.Context, parameter: click.Parameter, value: float | None) -> None:
        if value is not None:
            ctx.meta.setdefault(_LIMITS, {})[parameter.name] = value

    for name, about in reversed(_THRESHOLDS.items()):
        spelled = f"--{name.replace('_', '-')}"
        kind = click.INT if name.endswith("bytes") else click.FLOAT
        command = click.option(
            spelled, name, type=kind, callback=keep, expose_value=False, help=about
        )(command)
    return command


@click.command("gate", short_help="Hold a report against thresholds.")
@click.argument("report", required=False, type=click.Path(path_type=Path))
@_threshold_options
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write a Markdown summary here.")
@reading_options
@click.pass_context
def gate_command(
    ctx: click.Context, *, report: Path | None, junit: Path | None, markdown: Path | None
) -> None:
    """Apply thresholds to REPORT (report.json or a work directory); exit 3 where one fails.

    Thresholds given here replace the recipe's; where none is given, those of --recipe or of
    the work directory's recipe hold.
    """
    from nmexport.errors import GateFailed
    from nmexport.verification import gates

    path = _report_path(ctx, report)
    results = gates.evaluate(_read_report(path), _limits(ctx, path))
    _write(junit, gates.junit_xml(results))
    _write(markdown, gates.markdown(results))
    verdict = gates.verdict(results)
    if wants_json(ctx):
        emit_json(
            {
                "report": str(path),
                "gates": [result.as_dict() for result in results],
                "verdict": verdict,
            }
        )
    else:
        rows = [
            (one.name, f"{one.limit:g}", figure(one.value, 4), "pass" if one.passed else "FAIL")
            for one in results
        ]
        out = console()
        if rows:
            out.print(table(None, ("gate", "limit", "value", ""), rows))
        out.print(f"Verdict: {verdict}" + ("" if results else " (no gate is set)"))
    if verdict == "fail":
        raise GateFailed("; ".join(one.why or one.name for one in results if not one.passed))


def _report_path(ctx: click.Context, given: Path | None) -> Path:
    root = given if given is not None else request(ctx).existing_work().root
    return root / "report.json" if root.is_dir() else root


def _read_report(path: Path) -> dict[str, Any]:
    """Read `report.json`.

    Raises:
        ArtifactError: if it is missing or not a report of schema 1.
    """
    from nmexport.errors import ArtifactError

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema"] != 1:
            raise ArtifactError(f"{path} has schema {report['schema']}.", allowed="schema 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no report that can be read: {error}",
            fix="make one with `nmexport build` or `nmexport verify`",
        ) from error
    result: dict[str, Any] = report
    return result


def _limits(ctx: click.Context, report: Path) -> Any:
    """The gates in force: those given as options, else the recipe's."""
    from nmexport.recipe import GatesSection, load
    from nmexport.store.work_directory import RESOLVED
    from nmexport.verification.gates import limits_from

    given = ctx.meta.get(_LIMITS)
    if given:
        return limits_from(given)
    if request(ctx).file is not None:
        return request(ctx).recipe().gates
    beside = report.parent / RESOLVED
    return load(beside).gates if beside.is_file() else GatesSection()


def _write(path: Path | None, text: str) -> None:
    from nmexport.errors import UserError

    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}", fix="name another file") from error
