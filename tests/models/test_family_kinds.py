"""Which class is built from a model folder, and which families are refused before calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from nmexport.errors import ModelError
from nmexport.models import attention
from nmexport.models.exportable import check_exportable
from nmexport.models.families import text_name
from nmexport.models.loader import load_model
from nmexport.models.skeleton import skeleton
from nmexport.models.source import resolve
from nmexport.models.weights import WeightTable
from nmexport.recipe import ModelSection

from tests.support.tiny import save_tiny_model, save_tokenizer, tiny_config

if TYPE_CHECKING:
    from pathlib import Path

    from nmexport.models.source import ModelSource

IDS = torch.arange(3, 27).reshape(2, 12)
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": tiny_config("gemma3_text"),
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama", **tiny_config("llama")},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **tiny_config("mistral")},
        "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 16},
    },
    "qwen2_vl": {
        "text_config": {**tiny_config("qwen2"), "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {**tiny_config("qwen2"), "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64
        },
    },
}  # fmt: skip


def source_of(folder: Path) -> ModelSource:
    return resolve(ModelSection(id=str(folder)))


def save_wrapper(folder: Path, family: str, **overrides: Any) -> Any:
    """Save a tiny multimodal model; returns it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(family, **{**WRAPPERS[family], **overrides})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 2.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", WRAPPERS)
def test_the_text_part_of_a_multimodal_model(family: str, tied: bool, tmp_path: Path) -> None:
    whole = save_wrapper(tmp_path, family, tie_word_embeddings=tied)
    source = source_of(tmp_path)
    part = load_model(source, attention="eager")
    with torch.inference_mode():
        wanted = whole(input_ids=IDS).logits
        torch.testing.assert_close(part(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in part.named_modules() if "vision" in name]
    table = WeightTable(skeleton(source), source.weights_folder)
    for name, value in part.named_parameters():
        torch.testing.assert_close(table.read(name), value, rtol=0, atol=0)
    check_exportable(source, dtype=torch.float32)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.vision_tower.layers.0.mlp.fc1.weight", None),
    ],
)
def test_names_of_a_text_part(stored: str, name: str | None) -> None:
    assert text_name(stored) == name


REFUSED = {
    "mixtral": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "llama4_text": "mixture of experts",
    "mamba": "state-space or recurrent",
    "lfm3": "state-space or recurrent",
    "qwen3_5_text": "state-space or recurrent",
    "recurrent_gemma": "state-space or recurrent",
    "bart": "encoder-decoder",
    "bert": "encoder",
    "roberta": "positions",
    "gpt2": "Conv1D",
    "deepseek_v32": "update_indexer",
    "hrm_text": "several times a token",
    "mpt": "another path at some lengths of its cache",
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_a_sentence_that_names_the_kind(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family, **tiny_config(family))
    with pytest.raises(ModelError, match=REFUSED[family]) as caught:
        check_exportable(source_of(tmp_path), dtype=torch.float32)
    assert "\n" not in caught.value.problem
    assert f"'{family}'" in caught.value.problem
    assert "Next steps" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_model_that_embeds_text_is_no_language_model(family: str, tmp_path: Path) -> None:
    """EmbeddingGemma is of type gemma3_text: its prefill would see what decoding cannot."""
    save_tiny_model(tmp_path, family, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="embeds text"):
        check_exportable(source_of(tmp_path), dtype=torch.float32)


def test_a_falcon_with_linear_biases_is_refused(tmp_path: Path) -> None:
    """Transformers adds them to the mask and to the scores where it does not run torch's own."""
    options = {**tiny_config("falcon"), "alibi": True, "new_decoder_architecture": False}
    save_tiny_model(tmp_path, "falcon", **options)
    with pytest.raises(ModelError, match="linear biases") as caught:
        check_exportable(source_of(tmp_path), dtype=torch.float32)
    assert "'falcon'" in caught.value.problem


def test_an_encoder_decoder_is_refused_whoever_opens_it(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=384, d_model=64, d_ff=64, num_layers=1, num_heads=4, d_kv=16)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'t5' is an encoder-decoder"):
        load_model(source_of(tmp_path))


def test_an_unknown_argument_of_attention_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 3, 8)
    attention.attention(torch.nn.Linear(1, 1), x, x, x, None, sliding_window=4, head_mask=None)
    with pytest.raises(ModelError, match="Linear hands its attention head_mask, indices"):
        attention.attention(
            torch.nn.Linear(1, 1), x, x, x, None, head_mask=torch.ones(2), indices=torch.ones(1)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sinks_and_position_biases_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 2, torch.randn(4).to(dtype)
    query = torch.randn(1, 4, 5, 8).to(dtype)
    key, value = (torch.randn(1, 2, 7, 8).to(dtype) for _ in range(2))
    mask = attention.additive_mask(
        batch_size=1, q_length=5, kv_length=7, q_offset=2, dtype=dtype,
        mask_function=lambda b, h, q, k: k <= q,
    )  # fmt: skip
    bias = torch.randn(1, 4, 5, 7).to(dtype)
    wanted, _ = eager_attention_forward(module, query, key, value, mask + bias, scaling=0.3)
    got, _ = attention.attention(
        module, query, key, value, mask, scaling=0.3, s_aux=module.sinks, position_bias=bias
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_values_may_be_narrower_than_keys() -> None:
    """As in multi-head latent attention, which computes its keys and values from a small state."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8)
    value = torch.randn(1, 2, 7, 6)
    module = torch.nn.Module()
    got, _ = attention.attention(module, query, key, value, None)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(got, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (query, key, value)]
        assert attention.attention(module, *fakes, None)[0].shape == wanted.transpose(1, 2).shape
