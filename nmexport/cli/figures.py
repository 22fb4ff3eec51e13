"""A report as the table a person wants to see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nmexport.cli.output import figure, size, table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def show_report(out: Console, report: dict[str, Any], work: Path) -> None:
    """Print accuracy, speed and size, dense next to sparse, and the verdict."""
    out.print(table(_title(report), ("", "dense", "sparse", ""), _rows(report)))
    achieved = _at(report, "sparsity", "achieved")
    memory = report.get("memory") or {}
    out.print(
        f"Sparsity achieved {figure(_percent(achieved), 1, ' %')} in "
        f"{_at(report, 'sparsity', 'sparsified')} of {_at(report, 'sparsity', 'linears')} linears;"
        f" artifact {size(memory.get('artifact_bytes'))};"
        f" peak memory {size(memory.get('peak_rss_bytes'))}",
        soft_wrap=True,
    )
    for gate in report.get("gates") or []:
        mark = "pass" if gate["passed"] else "FAIL"
        out.print(
            f"Gate {gate['name']}: {mark} (limit {gate['limit']:g}, "
            f"value {figure(gate['value'], 4)})",
            soft_wrap=True,
        )
    out.print(f"Verdict: {report.get('verdict', 'none')}", soft_wrap=True)
    page = next(
        (work / name for name in ("report.html", "report.md") if (work / name).is_file()),
        work / "report.json",
    )
    out.print(f"Report: {page}", soft_wrap=True, markup=False)


def _title(report: dict[str, Any]) -> str:
    mitigations = ", ".join(report.get("mitigations") or []) or "no mitigation"
    return (
        f"{_at(report, 'model', 'id')}  {report.get('pattern')}  {report.get('criterion')}, "
        f"{mitigations}  on {_at(report, 'latency', 'runtime') or report.get('target')}"
    )


def _rows(report: dict[str, Any]) -> list[tuple[object, ...]]:
    accuracy = report.get("accuracy") or {}
    dataset = accuracy.get("dataset")
    return [
        (
            f"perplexity ({dataset})" if isinstance(dataset, str) else "perplexity",
            figure(_at(accuracy, "dense", "perplexity")),
            figure(_at(accuracy, "sparse", "perplexity")),
            figure(accuracy.get("perplexity_ratio"), 3, "x"),
        ),
        *_decode_only_row(accuracy),
        ("KL to dense, mean", "", figure(accuracy.get("kl_mean"), 4), ""),
        ("top-1 agreement", "", figure(_percent(accuracy.get("top1_agreement")), 1, " %"), ""),
        *_task_rows(accuracy),
        _speed_row(report, "prefill"),
        _speed_row(report, "decode"),
    ]


def _decode_only_row(accuracy: dict[str, Any]) -> list[tuple[object, ...]]:
    """Perplexity with dense prompts; nothing where it was not measured."""
    decoded = accuracy.get("decode_only")
    if not decoded or decoded.get("perplexity_ratio") is None:
        return []
    return [
        (
            "  sparse in decode only",
            figure(_at(decoded, "dense", "perplexity")),
            figure(_at(decoded, "sparse", "perplexity")),
            figure(decoded["perplexity_ratio"], 3, "x"),
        )
    ]


def _task_rows(accuracy: dict[str, Any]) -> list[tuple[object, ...]]:
    """Scores with their standard errors."""
    return [
        (
            f"{name}, {entry['metric']}, {entry['n']} documents",
            _with_error(entry["dense"], entry["dense_stderr"]),
            _with_error(entry["sparse"], entry["sparse_stderr"]),
            _with_error(entry["sparse"] - entry["dense"], entry["difference_stderr"]),
        )
        for name, entry in (accuracy.get("tasks") or {}).items()
    ]


def _with_error(value: float, stderr: float | None) -> str:
    return figure(value, 3) if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _speed_row(report: dict[str, Any], phase: str) -> tuple[object, ...]:
    """Median milliseconds, dense and sparse, and how many times faster sparse is."""
    count = _at(report, "latency", "dense", phase, "tokens" if phase == "prefill" else "context")
    unit = "tokens" if phase == "prefill" else "tokens in the cache"
    return (
        f"{phase}, {count} {unit}" if count is not None else phase,
        figure(_at(report, "latency", "dense", phase, "p50_ms"), 1, " ms"),
        figure(_at(report, "latency", "sparse", phase, "p50_ms"), 1, " ms"),
        figure(_at(report, "latency", "speedup", phase), 2, "x the speed"),
    )


def _at(node: Any, *path: str) -> Any:
    """A value inside nested keys; None where any of them is missing or null."""
    for part in path:
        if not isinstance(node, dict):
            return None
        node = node.get(part)
    return node


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
