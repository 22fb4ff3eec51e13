"""On a machine with a GPU a test that skips has not been run: `--no-skips` makes that a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nmexport.runtimes.tensorrt import library as tensorrt_library

if TYPE_CHECKING:
    from collections.abc import Generator


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="where a GPU is, a skipped test is a failure"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--no-skips", default=False) and tensorrt_library.gpu_is_usable():
        refuse_skip(report)
    return report


def refuse_skip(report: pytest.TestReport) -> None:
    """Make a failure of a skip, with its reason."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"not run on a machine with a GPU: {reason}"
