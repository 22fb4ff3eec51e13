"""Estimates for machines that are not here, and what the recipes say of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from nmexport import recipe as recipes
from nmexport.cli.main import cli
from nmexport.inspect.estimate import Shape, shape_of
from nmexport.inspect.machines import LAYER_BY_LAYER, MACHINES, Expected, expect
from nmexport.models.families import refuse_kind
from nmexport.models.skeleton import skeleton, tensors_of_config
from nmexport.models.source import ModelSource
from nmexport.recipe import resolve
from nmexport.sparsity.targets import select_targets

from tests.support.published_configs import BILLIONS, CONFIGS, save_config
from tests.support.tiny import tiny_config

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = Shape(parameters=8_030_261_248, layer=525_336_576, matrix=58_720_256, tensor=525_336_576)
COMMAND = "nmexport estimate --model {name} config.json"


def said(row: Expected) -> str:
    """An estimate as a recipe's comment says it."""
    if row.way == "not":
        return f"#   {row.machine}: does not fit"
    hours = row.seconds / 3600
    time = f"{hours:.2g} h" if hours >= 1 else f"{max(1, round(row.seconds / 60))} min"
    options = f" with {LAYER_BY_LAYER}" if row.way == "layer by layer" else ""
    return f"#   {row.machine}: learns {row.way}{options}, {row.memory_bytes / 1e9:.2g} GB, {time}"


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_says_what_the_estimate_says(name: str, tmp_path: Path) -> None:
    shape = shape_of(tensors_of_config(save_config(tmp_path, name)))
    assert shape.parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    text = recipes.path_of(name).read_text("utf-8")
    assert COMMAND.format(name=name) in text
    lines = [said(expect(resolve(name), shape, machine)) for machine in MACHINES]
    assert [line for line in text.splitlines() if line.startswith("#   ")] == lines


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_fits_a_tiny_model_of_its_family(name: str, tmp_path: Path) -> None:
    family = CONFIGS[name]["model_type"]
    document = {"model_type": family, **tiny_config(family)}
    (tmp_path / "config.json").write_text(json.dumps(document))
    source = ModelSource(id=name, revision=None, folder=tmp_path, gguf_file=None, digest="")
    model = skeleton(source)
    refuse_kind(model)
    section = resolve(name).sparsity
    chosen = select_targets(
        model, section.pattern, include=section.targets.include, exclude=section.targets.exclude
    )
    assert len(chosen) >= 2 * 4
    assert not any("lm_head" in one for one in chosen)


def test_a_bigger_gpu_is_where_a_7b_model_learns() -> None:
    small, big, bigger, host = (expect(resolve("llama3"), LLAMA, machine) for machine in MACHINES)
    assert (small.way, big.way, host.way) == ("on the CPU", "on the GPU", "on the CPU")
    assert big.seconds < small.seconds / 4
    assert bigger.way == "on the GPU"
    assert bigger.seconds < min(big.seconds, 15 * 60)
    assert bigger.memory_bytes == big.memory_bytes
    # A 7B model took 45 GB in fold on an 80 GB GPU.
    assert big.memory_bytes == pytest.approx(45e9 * 8.03 / 7.25, rel=0.25)


def test_what_does_not_fit_runs_layer_by_layer_where_it_may() -> None:
    machine = replace(MACHINES[-1], host_bytes=16 << 30)
    budget = {"allocation.budget.max_kl": 0.1}
    assert expect(resolve("llama3", budget), LLAMA, machine).way == "not"
    plain = {"sparsity.criterion": "act", "sparsity.mitigations": ["var"]}
    learned, unlearned = (expect(resolve("llama3", more), LLAMA, machine) for more in ({}, plain))
    assert learned.way == unlearned.way == "layer by layer"
    assert unlearned.memory_bytes < learned.memory_bytes < machine.host_bytes
    assert unlearned.seconds < learned.seconds


@given(parameters=st.integers(10**6, 10**11), factor=st.integers(2, 9))
def test_more_parameters_take_more(parameters: int, factor: int) -> None:
    recipe = resolve("llama3")
    for machine in MACHINES:
        less, more = (
            expect(
                recipe,
                Shape(parameters=count, layer=count // 32, matrix=count // 320, tensor=count // 32),
                machine,
            )
            for count in (parameters, factor * parameters)
        )
        if more.way != less.way:  # layer by layer takes less memory, and learns from less
            continue
        assert more.seconds >= less.seconds
        assert more.memory_bytes > less.memory_bytes


def test_the_verb_needs_a_configuration_and_no_weights(tmp_path: Path) -> None:
    config = save_config(tmp_path / "m", "smollm2")

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["estimate", *words])
        return done.exit_code, done.output

    code, shown = run(str(config), "--model", "smollm2", "--json")
    document = json.loads(shown)
    assert (code, document["parameters"]) == (0, 134_515_008)
    assert [row["machine"] for row in document["machines"]] == [one.name for one in MACHINES]
    code, shown = run(str(config.parent), "--model", "smollm2")
    assert code == 0
    assert "on the GPU" in shown
    code, shown = run("--model", "llama3")
    assert code == 1
    assert "There is no config.json at meta-llama/Llama-3.1-8B" in shown
    assert "weights are not needed" in shown
