"""Which linears a recipe means, on several families, and what it is told where it means none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nmexport.errors import PatternError, TargetError
from nmexport.sparsity.pattern import NMPattern
from nmexport.sparsity.targets import fitting_patterns, linears_of, select_targets
from torch import nn

PATTERN = NMPattern(8, 16)


def tiny(family: str, **overrides: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **{**sizes, **overrides})
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny("llama")


def chosen(model: nn.Module, *, include: Any = ("*",), exclude: Any = ("lm_head",)) -> list[str]:
    return select_targets(model, PATTERN, include=include, exclude=exclude)


def test_default_is_every_linear_but_the_output_embedding(llama: nn.Module) -> None:
    names = chosen(llama)
    assert len(names) == 4 * 7
    assert names == [name for name in linears_of(llama) if name != "lm_head"]


@pytest.mark.parametrize(
    ("family", "count", "part"),
    [
        ("qwen2", 7, "q_proj"),
        ("qwen3", 7, "o_proj"),
        ("gemma2", 7, "down_proj"),
        ("phi3", 4, "qkv_proj"),
        ("phi3", 4, "gate_up_proj"),
    ],
)
def test_families(family: str, count: int, part: str) -> None:
    model = tiny(family)
    assert len(chosen(model)) == 4 * count
    assert len(chosen(model, include=(part,))) == 4


class Renamed(nn.Module):
    """A model whose output embedding is not called lm_head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.embed_out = nn.Linear(16, 32)

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out


def test_an_output_embedding_of_another_name_is_lm_head_too() -> None:
    assert chosen(Renamed()) == ["body"]
    assert chosen(Renamed(), include=("lm_head",), exclude=()) == ["embed_out"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 4),
        ("*_proj", 28),
        ("model.layers.1.mlp.*", 3),
        ("type:Linear", 28),
        ("type:Module", 28),
        ("layer:0-1", 14),
        ("layer:-2--1", 14),
        ("layer:2", 7),
        ("layer:-1", 7),
        ("layer:0--1", 28),
    ],
)
def test_include_patterns(llama: nn.Module, pattern: str, count: int) -> None:
    assert len(chosen(llama, include=(pattern,))) == count


def test_exclude_wins_and_the_order_is_the_models(llama: nn.Module) -> None:
    names = chosen(llama, include=("v_proj", "q_proj"), exclude=("layer:0", "layer:-1"))
    assert names == [
        f"model.layers.{index}.self_attn.{part}"
        for index in (1, 2)
        for part in ("q_proj", "v_proj")
    ]


@pytest.mark.parametrize("both", ["*", "layer:0", "q_proj", "type:Linear"])
def test_exclude_wins_over_the_same_words(llama: nn.Module, both: str) -> None:
    with pytest.raises(TargetError, match="Nothing is left"):
        chosen(llama, include=(both,), exclude=("lm_head", both))


def test_what_is_included_by_name_is_not_excluded_by_that_name(llama: nn.Module) -> None:
    assert chosen(llama, include=("lm_head",)) == ["lm_head"]
    assert len(chosen(llama, include=("*", "lm_head"))) == len(chosen(llama)) + 1
    assert "lm_head" not in chosen(llama, include=("*", "type:Linear"))
    names = chosen(llama, include=("lm_head", "q_proj"), exclude=("lm_head", "layer:0-2"))
    assert names == ["model.layers.3.self_attn.q_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("q_porj", "q_proj"),
        ("type:Linaer", "type:Linear"),
        ("model.layers.0.self_attn.qproj", "model.layers.0.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize("role", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_lists_near_ones(
    llama: nn.Module, pattern: str, said: str, role: str
) -> None:
    with pytest.raises(TargetError, match=f"{role} pattern") as caught:
        chosen(llama, **{role: (pattern,)})
    assert caught.value.fix is not None
    assert said in caught.value.fix


@pytest.mark.parametrize("pattern", ["layer:0-4", "layer:3-1", "layer:-9", "layer:first", "layer:"])
def test_bad_layer_ranges(llama: nn.Module, pattern: str) -> None:
    with pytest.raises(TargetError):
        chosen(llama, include=(pattern,))


def test_nothing_left_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(TargetError, match="Nothing is left") as caught:
        chosen(llama, include=("lm_h*",))
    assert "--targets lm_head" in str(caught.value.fix)
    with pytest.raises(TargetError, match="Nothing is left"):
        chosen(llama, include=())


def test_models_without_linears_or_layers() -> None:
    with pytest.raises(TargetError, match=r"no torch\.nn\.Linear"):
        chosen(nn.Sequential(nn.ReLU()))
    with pytest.raises(TargetError, match="no list of layers"):
        chosen(nn.Sequential(nn.Linear(16, 16)), include=("layer:0",), exclude=())


def test_a_width_that_does_not_fit_names_the_layer_and_what_would() -> None:
    model = tiny("llama", intermediate_size=72)
    with pytest.raises(PatternError, match=r"layers\.0\.mlp\.down_proj.*72") as caught:
        chosen(model)
    assert caught.value.allowed is not None
    assert "4:8, 2:4, 1:2" in caught.value.allowed
    assert len(chosen(model, exclude=("lm_head", "down_proj"))) == 4 * 6


def test_fitting_patterns_keep_the_density_first() -> None:
    assert [str(one) for one in fitting_patterns([24, 48], NMPattern(8, 16))][:5] == [
        "12:24",
        "6:12",
        "4:8",
        "3:6",
        "2:4",
    ]
    assert str(fitting_patterns([25], NMPattern(8, 16))[0]) == "12:25"
    assert fitting_patterns([67], NMPattern(8, 16)) == []
