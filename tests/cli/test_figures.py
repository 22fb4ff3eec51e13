"""The table of a report on the terminal."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING

from nmexport.cli.figures import show_report
from nmexport.recipe import ModelSection, Recipe
from rich.console import Console

from tests.support.sample_report import STORED_DENSE, sample_report

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.report.model import Report


def rows(report: Report, folder: Path) -> dict[str, str]:
    """Lines of what is printed, by the words that they begin with."""
    out = Console(file=StringIO(), width=200)
    show_report(out, report, folder)
    lines = out.file.getvalue().splitlines()
    return {line.strip().partition("  ")[0]: line for line in lines}


def test_dense_in_integers_has_a_column_and_tasks_leave_it_empty(tmp_path: Path) -> None:
    recipe = Recipe(model=ModelSection(id="smollm2", weights="int8"))
    report = sample_report(tmp_path, layers=2, recipe=recipe)
    task = next(iter(report.accuracy.tasks.values()))
    # A task whose name begins as a row of times does.
    accuracy = replace(report.accuracy, tasks={"decode_words": task})
    report = replace(report, stored_dense=STORED_DENSE, accuracy=accuracy)
    printed = rows(report, tmp_path)
    for row, value in {
        "perplexity": "12.34",
        "KL to dense": "0.0021",
        "prefill": "65.4 ms",
        "decode,": "9.9 ms",
    }.items():
        (line,) = [text for name, text in printed.items() if name.startswith(row)]
        assert value in line
    (task_line,) = [text for name, text in printed.items() if name.startswith("decode_words")]
    assert "ms" not in task_line
    assert "12.34" not in "".join(rows(replace(report, stored_dense=None), tmp_path).values())
