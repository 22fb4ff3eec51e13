"""Text that a model generates: shape, seed, vocabulary, and what follows an end of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from nmexport.calibration import self_text as module
from nmexport.calibration.self_text import self_text, several_kinds
from nmexport.errors import ModelError
from nmexport.progress import Silent

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def test_the_same_seed_gives_the_same_text_whatever_the_batches(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = self_text(model, tokenizer, progress=Silent(), label="")
    first = generate(5, 20, 7)
    assert first.shape == (5, 20)
    assert first.dtype == np.int64
    assert len({tuple(row) for row in first.tolist()}) == 5
    np.testing.assert_array_equal(first, generate(5, 20, 7))
    assert not np.array_equal(first, generate(5, 20, 8))
    monkeypatch.setattr(module, "_MAX_BATCH", 2)
    assert generate(5, 20, 7).shape == (5, 20)


def test_only_ordinary_tokens_and_ends_of_text(model: Any, tokenizer: Any) -> None:
    ids = self_text(model, tokenizer, progress=Silent(), label="")(8, 40, 0)
    assert (ids < len(tokenizer)).all()
    assert not np.isin(ids, [0, 1]).any()  # <pad>, <s>
    assert (ids[:, 0] != 2).all()


def test_the_text_is_what_the_model_says(model: Any, tokenizer: Any) -> None:
    """A model that is sure of itself is sampled greedily: so the cache is right."""
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    ids = torch.from_numpy(self_text(model, tokenizer, progress=Silent(), label="")(2, 12, 3))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    logits[..., [0, 1, *range(len(tokenizer), logits.shape[-1])]] = -torch.inf
    chosen = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    behind = (logits.amax(-1) - chosen)[ids[:, :-1] != 2]
    assert (behind < 20).all()  # unlikely by e^-20 or more, of logits thousands apart


def test_another_text_follows_an_end(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = list(range(2, len(tokenizer)))
    ids = self_text(model, tokenizer, progress=Silent(), label="")(2, 6, 0)
    assert ids.shape == (2, 6)
    assert (ids != 2).all()  # every token ends a text, so all are random starts


def test_tokens_are_drawn_as_the_model_says(model: Any, tokenizer: Any) -> None:
    sampler, count = module._Sampler(model, tokenizer, 5), 40_000
    logits = torch.linspace(-3, 3, model.config.vocab_size)
    drawn = sampler._sample(logits.expand(count, -1)).flatten()
    allowed = sampler._allowed
    expected = torch.where(allowed, logits.exp(), 0.0)
    expected /= expected.sum()
    found = torch.bincount(drawn, minlength=len(logits)) / count
    assert (found[~allowed] == 0).all()
    assert (found - expected).abs().max() < 5 * (expected.max() / count).sqrt()


def test_the_only_token_with_probability_is_drawn(model: Any, tokenizer: Any) -> None:
    sampler = module._Sampler(model, tokenizer, 0)
    chosen = sampler._starts[-1]  # behind it, the distribution function stays where it is
    logits = torch.full((500, model.config.vocab_size), -1e9)
    logits[:, chosen] = 0.0
    assert (sampler._sample(logits) == chosen).all()


def test_a_broken_model_is_refused(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        self_text(model, tokenizer, progress=Silent(), label="")(1, 8, 0)


CHAT = "{% for message in messages %}<s>{{ message.role }}:{{ message.content }}</s>{% endfor %}"


def test_several_kinds_begin_as_they_should_and_chats_take_turns(
    model: Any, tokenizer: Any
) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # Every word ends a turn, so that a chat is nothing but turns.
    model.generation_config.eos_token_id = list(range(2, len(tokenizer)))
    talking = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    talking.chat_template = CHAT
    kinds = several_kinds(talking)
    assert [kind.name for kind in kinds[:3]] == ["plain", "chat", "code"]
    assert len({kind.start for kind in kinds if kind.name == "code"}) == 4
    ids = self_text(model, talking, progress=Silent(), label="", kinds=kinds)(3, 60, 0).tolist()

    def text_of(part: str) -> list[int]:
        return list(talking(part, add_special_tokens=False).input_ids)

    chat, code = ids[1], ids[2]
    whole = text_of("<s>user:") + (text_of("</s><s>assistant:") + text_of("</s><s>user:")) * 10
    assert chat == whole[:60]
    begun = text_of("```python\nimport")
    assert code[: len(begun)] == begun
    assert ids[0][0] not in talking.all_special_ids


def test_without_a_template_there_is_no_chat(tokenizer: Any) -> None:
    assert {kind.name for kind in several_kinds(tokenizer)} == {"plain", "code"}
    broken = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    broken.chat_template = "{{ raise_exception('system first') }}"
    assert {kind.name for kind in several_kinds(broken)} == {"plain", "code"}
    broken.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    assert {kind.name for kind in several_kinds(broken)} == {"plain", "code"}
