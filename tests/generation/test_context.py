"""Sequences longer than a model's context: refused at the start, or ended with a word."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from nmexport.errors import ArtifactError, RecipeError
from nmexport.generation import loop
from nmexport.generation.context import context_length, length_switch
from nmexport.generation.sampler import Sampler
from nmexport.models.context import check_lengths, context_of
from nmexport.models.genai_config import genai_config
from nmexport.models.source import resolve
from nmexport.models.tracing import CacheShape
from nmexport.recipe import ModelSection
from nmexport.recipe import resolve as resolve_recipe

from tests.serving.test_scheduler import CountingSession
from tests.support.tiny import save_tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 100_000])
def test_an_export_that_does_not_say_its_context(text: str, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(ArtifactError, match="does not say the model's context length"):
        context_length(tmp_path)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_lengths_beyond_the_context_are_refused_with_what_to_type(
    family: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, family)  # of 256 positions
    source = resolve(ModelSection(id=str(tmp_path)))
    with pytest.raises(RecipeError, match="context of 256 tokens") as caught:
        check_lengths(source, resolve_recipe(str(tmp_path)), measured=True)
    assert "--calib-length 512" in caught.value.problem
    assert caught.value.fix == "--calib-length 256 --eval-length 256"
    fitting = {"calibration.length": 256, "evaluation.length": 256}
    check_lengths(source, resolve_recipe(str(tmp_path), fitting), measured=True)
    with pytest.raises(RecipeError, match=r"latency\.decode_context 256") as caught:
        check_lengths(
            source,
            resolve_recipe(str(tmp_path), {**fitting, "latency.decode_context": 256}),
            measured=True,
        )
    assert "latency.decode_context: 255" in str(caught.value.fix)


def test_a_model_without_positions_has_no_end() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("bloom", vocab_size=8, hidden_size=8, n_layer=1, n_head=1)
    assert context_of(config) is None
    document = genai_config(config, None, [CacheShape(1, 8, 8)], filename="model.onnx")
    assert document["model"]["context_length"] > 1 << 16


def test_beyond_the_switch_of_frequencies_a_sequence_is_computed_anew() -> None:
    session = CountingSession()
    tokens = loop.continuation(session, [1, 2], Sampler(), max_tokens=5, ends=frozenset(), switch=4)
    assert list(tokens) == [3, 4, 5, 6, 7]
    assert session.calls == [[1, 2], [3], [4], [1, 2, 3, 4, 5], [6]]


def test_length_switch_is_that_of_longrope(tmp_path: Path) -> None:
    assert length_switch(tmp_path) is None
    rotary = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": rotary}))
    assert length_switch(tmp_path) == 16
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": {"rope_type": "yarn"}}))
    assert length_switch(tmp_path) is None
