"""What a request may ask, how tokens are drawn, and text without transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import ArtifactError, RequestError
from nmexport.serving.options import GenerationOptions, options_from
from nmexport.serving.sampling import Sampler
from nmexport.serving.tokenizer import ServingTokenizer, messages_from

from tests.served import CHAT_TEMPLATE
from tests.tiny import save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ("naïve façade, 日本語, 👩🏽‍🚀 and ∑; spaces  too", "<s>begun", " x", "a</s>b", "it 's . !")


# -- options --------------------------------------------------------------------------------------


def test_options_take_defaults_aliases_and_whole_numbers_for_fractions() -> None:
    defaults = GenerationOptions(temperature=0.7, top_k=5)
    found = options_from({"temperature": 0, "random_seed": 3, "stop_words": ["a", "b"]}, defaults)
    assert found == GenerationOptions(temperature=0.0, top_k=5, seed=3, stop=("a", "b"))
    assert options_from({"stop": "one"}).stop == ("one",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tempreture": 1}, "Unknown parameter 'tempreture'"),
        ({"seed": 1, "random_seed": 1}, "seed is given twice"),
        ({"max_tokens": 1.5}, "max_tokens cannot be 1.5"),
        ({"max_tokens": True}, "max_tokens cannot be True"),
        ({"temperature": "hot"}, "temperature cannot be 'hot'"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop cannot be"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 300}, "stop"),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        options_from(values)


def test_a_seed_that_nobody_chose_is_new_each_time() -> None:
    assert GenerationOptions(seed=4).seed_or_new == 4
    assert len({GenerationOptions().seed_or_new for _ in range(8)}) == 8


# -- sampling -------------------------------------------------------------------------------------


def test_penalties_are_the_published_formulas() -> None:
    logits = np.array([2.0, -1.0, 0.5, 1.0], dtype=np.float32)
    one = Sampler(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, prompt=[1])
    np.testing.assert_allclose(one._penalised(logits), [2.0, -2.0, 0.5, 1.0])
    assert one(logits) == 0
    # 0 was drawn once: 2 / 2 - 0.25 - 0.5
    np.testing.assert_allclose(one._penalised(logits), [0.25, -2.0, 0.5, 1.0])
    assert logits[0] == 2.0  # the runtime's own buffer


@pytest.mark.parametrize("count", [0, 1, 3, 9, 50])
def test_few_likeliest_are_those_of_a_full_sort(count: int) -> None:
    logits = np.random.default_rng(0).integers(0, 8, 40).astype(np.float32)  # many equals
    order = np.argsort(-logits, kind="stable")
    tokens, _ = Sampler(temperature=1.0, top_k=count)._candidates(logits)
    np.testing.assert_array_equal(tokens, order[: count or None])


# -- tokenizer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return path


@pytest.mark.parametrize("with_begin", [False, True])
def test_ids_and_text_are_those_of_transformers(
    folder: Path, tmp_path: Path, with_begin: bool
) -> None:
    from transformers import AutoTokenizer

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if with_begin:  # as Llama's: a begin token in front of every text
        path = tmp_path / "tokenizer.json"
        document = json.loads(path.read_text())
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        path.write_text(json.dumps(document))
    ours, theirs = ServingTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == plain
        assert ours.decode(plain) == theirs.decode(plain, skip_special_tokens=True)
        if not text.startswith("<s>"):
            assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode("<s>begun")[:2] != [1, 1]  # not begun twice
    assert ours.eos_token_id == theirs.eos_token_id


TEMPLATES = (
    CHAT_TEMPLATE,
    """{{ bos_token }}{% for m in messages %}
  {% if m.role == 'user' %}
    [{{ m.content }}]
  {% endif %}
{% endfor %}{{ messages | tojson }}""",
    """{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | trim }}
{% endfor %}{{ strftime_now('%Y') }}{{ eos_token }}""",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_is_rendered_as_transformers_renders_it(
    folder: Path, tmp_path: Path, template: str
) -> None:
    from transformers import AutoTokenizer

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = [
        {"role": "system", "content": "Be <brief> & 'kind' "},
        {"role": "user", "content": "héllo"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ServingTokenizer(tmp_path).render(messages) == theirs


def test_a_template_may_refuse_and_there_may_be_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    plain = ServingTokenizer(tmp_path)
    assert not plain.has_chat_template
    assert plain.eos_token_id is None
    with pytest.raises(RequestError, match="no chat template"):
        plain.render([{"role": "user", "content": "x"}])
    config = {
        "chat_template": [{"name": "default", "template": "{{ raise_exception('only user') }}"}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="only user"):
        ServingTokenizer(tmp_path).render([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ArtifactError, match="chat template"):
        ServingTokenizer(tmp_path)


@pytest.mark.parametrize("contents", [None, "{}", "no json"])
def test_no_tokenizer_that_can_be_read(tmp_path: Path, contents: str | None) -> None:
    if contents is not None:
        (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        ServingTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "not a list of messages"),
        ('{"role": "user"}', "not a list"),
        ('[{"role": "user"}]', "holds"),
        ('[{"role": "user", "content": 3}]', "holds"),
        ('[{"role": "pope", "content": "x"}]', "role 'pope'"),
        ("[3]", "holds 3"),
    ],
)
def test_wrong_messages_are_named(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        messages_from(text)
