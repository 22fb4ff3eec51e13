"""How long a person waits before anything happens: processor time, which a busy machine spares."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TRIES = 15


def cpu_seconds(*arguments: str) -> float:
    """Processor time of one run of this Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("budget", "arguments"),
    [
        (0.3, ("-c", "import nmexport.cli.main")),
        (0.2, ("-m", "nmexport", "--help")),
    ],
    ids=["import", "help"],
)
def test_the_command_line_is_there_at_once(budget: float, arguments: tuple[str, ...]) -> None:
    """A neighbour on the same core makes a run dearer, never cheaper: one good run shows it."""
    assert any(cpu_seconds(*arguments) < budget for _ in range(TRIES))


def test_a_build_with_nothing_to_do_ends_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    sizes = "--calib-samples 4 --calib-length 32 --eval-windows 2 --eval-length 32"
    method = "--pattern 8:16 --criterion act --mitigation none --grouping consecutive"
    paths = ("--model", str(tiny_llama), "--work", str(tmp_path / "work"))
    line = ("-m", "nmexport", "build", *paths, *method.split(), *sizes.split(), "--to", "fold")
    assert cpu_seconds(*line) > 1.0
    assert any(cpu_seconds(*line) < 1.0 for _ in range(TRIES))
