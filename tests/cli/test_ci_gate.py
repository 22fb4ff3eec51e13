"""The workflow that users copy: every command in it is one that our command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from nmexport.cli.main import cli
from nmexport.report import pages

from tests.support.sample_report import sample_report

WORKFLOW = Path(__file__).resolve().parents[2] / "recipes" / "ci-gate.yml"


def job() -> Any:
    # YAML 1.1 reads the key `on` as true.
    document = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    assert {"name", True, "env", "jobs"} <= set(document)
    (only,) = document["jobs"].values()
    return only, document["env"]


def commands() -> list[list[str]]:
    """Words of each call of nmexport, variables replaced by what the workflow sets."""
    only, env = job()
    scripts = [step["run"].replace("\\\n", " ") for step in only["steps"] if "run" in step]
    lines = [line.strip() for script in scripts for line in script.splitlines()]
    for name, value in env.items():
        lines = [line.replace(f"${name}", value) for line in lines]
    return [shlex.split(line)[1:] for line in lines if line.startswith("nmexport ")]


def test_the_workflow_builds_gates_and_uploads() -> None:
    only, env = job()
    assert [words[0] for words in commands()] == ["doctor", "recipes", "build", "gate"]
    gate = commands()[-1]
    junit = gate[gate.index("--junit") + 1]
    (upload,) = (one for one in only["steps"] if "upload-artifact" in one.get("uses", ""))
    assert upload["if"] == "always()"
    kept = upload["with"]["path"].replace("${{ env.WORK }}", env["WORK"]).split()
    assert {junit, f"{env['WORK']}/report.html"} <= set(kept)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_of_ours(words: list[str]) -> None:
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    # Parses and converts every word; a wrong option raises a usage error.
    command.make_context("nmexport", list(words), resilient_parsing=False).close()


def test_every_option_of_the_gate_gates(tmp_path: Path) -> None:
    pages.write(sample_report(tmp_path, layers=1), tmp_path)
    words = [str(tmp_path) if word == "work" else word for word in commands()[-1]]
    words = [str(tmp_path / word) if re.fullmatch(r"gate\.\w+", word) else word for word in words]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 3, done.output  # the sample's perplexity is twice dense's
    cases = (tmp_path / "gate.xml").read_text("utf-8")
    assert cases.count("<testcase") == sum(word.startswith(("--max", "--min")) for word in words)
    assert "<failure" in cases
    assert "max_perplexity_ratio" in (tmp_path / "gate.md").read_text("utf-8")
