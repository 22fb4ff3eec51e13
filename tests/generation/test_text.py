"""What a request may ask, how tokens are drawn, and text without transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.errors import ArtifactError, RequestError
from nmexport.generation.chat import messages_from
from nmexport.generation.options import GenerationOptions, options_from
from nmexport.generation.sampler import Sampler, likeliest_tokens
from nmexport.generation.tokenizer import Tokenizer

from tests.support.served import CHAT_TEMPLATE
from tests.support.tiny import save_tokenizer

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
        ({"temperature": 1e-310}, r"temperature 1e-310 \(allowed: 0, or 0.001 to 100\)"),
        ({"temperature": 1e300}, "temperature 1e\\+300"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_k": -1}, "top_k -1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"repetition_penalty": 1e-44}, r"repetition_penalty 1e-44 \(allowed: 0.1 to 10\)"),
        ({"repetition_penalty": 1e300}, "repetition_penalty 1e\\+300"),
        ({"presence_penalty": -1e300}, r"presence_penalty -1e\+300 \(allowed: -100 to 100\)"),
        ({"frequency_penalty": 1e38}, r"frequency_penalty 1e\+38 \(allowed: -100 to 100\)"),
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


@pytest.mark.parametrize("temperature", [0.001, 100.0])
@pytest.mark.parametrize("repetition", [0.1, 10.0])
@pytest.mark.parametrize("penalty", [-100.0, 100.0])
def test_whatever_is_allowed_can_be_drawn_from(
    temperature: float, repetition: float, penalty: float
) -> None:
    sent = {
        "temperature": temperature,
        "repetition_penalty": repetition,
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
    }
    # As clients send them: the bounds are met in float32, too.
    options = options_from({name: float(np.float32(value)) for name, value in sent.items()})
    draw = Sampler(options, prompt=range(30))
    logits = np.random.default_rng(0).normal(scale=1e4, size=64).astype(np.float32)
    assert all(0 <= draw(logits) < 64 for _ in range(50))


def test_a_seed_that_nobody_chose_is_new_each_time() -> None:
    assert GenerationOptions(seed=4).seed_or_new == 4
    assert len({GenerationOptions().seed_or_new for _ in range(8)}) == 8


# -- sampling -------------------------------------------------------------------------------------


def test_penalties_are_the_published_formulas() -> None:
    logits = np.array([2.0, -1.0, 0.5, 1.0], dtype=np.float32)
    options = GenerationOptions(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5
    )
    one = Sampler(options, prompt=[1])
    np.testing.assert_allclose(one._penalise(logits), [2.0, -2.0, 0.5, 1.0])
    assert one(logits) == 0
    # 0 was drawn once: 2 / 2 - 0.25 - 0.5
    np.testing.assert_allclose(one._penalise(logits), [0.25, -2.0, 0.5, 1.0])
    assert logits[0] == 2.0  # the runtime's own buffer


@pytest.mark.parametrize("count", [0, 1, 3, 9, 50])
def test_few_likeliest_are_those_of_a_full_sort(count: int) -> None:
    logits = np.random.default_rng(0).integers(0, 8, 40).astype(np.float32)  # many equals
    order = np.argsort(-logits, kind="stable")
    tokens, _ = Sampler(GenerationOptions(temperature=1.0, top_k=count))._candidates(logits)
    np.testing.assert_array_equal(tokens, order[: count or None])


def hard_to_order(size: int) -> np.ndarray:
    """Many equals, both zeros, the smallest and largest there are, and what a mask leaves."""
    rng = np.random.default_rng(3)
    logits = rng.normal(scale=5, size=size).astype(np.float32)
    logits[rng.integers(size, size=size // 2)] = rng.integers(-3, 3, size // 2)
    for value in (0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, -np.inf):
        logits[rng.integers(size, size=5)] = value
    return logits


@pytest.mark.parametrize("size", [1, 2, 300, 49_152, 70_000])
def test_a_whole_vocabulary_is_in_the_order_of_a_stable_sort(size: int) -> None:
    logits = hard_to_order(size)
    np.testing.assert_array_equal(likeliest_tokens(logits, 0), np.argsort(-logits, kind="stable"))


def drawn_by_a_full_sort(logits: np.ndarray, *, temperature: float, top_p: float, seed: int) -> int:
    """The plain formula, with NumPy's own stable sort."""
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order].astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    kept = probabilities[np.cumsum(probabilities) - probabilities < top_p]
    return int(np.random.default_rng(seed).choice(order[: kept.size], p=kept / kept.sum()))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (30.0, 0.999)])
def test_draws_are_those_of_a_full_sort(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(scale=2, size=49_152).astype(np.float32)
    for seed in range(10):
        one = Sampler(GenerationOptions(temperature=temperature, top_p=top_p, seed=seed))
        expected = drawn_by_a_full_sort(logits, temperature=temperature, top_p=top_p, seed=seed)
        assert one(logits) == expected


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
    ours, theirs = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
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
    """{% for m in messages %}{% generation %}
<{{ m.content }}>{% endgeneration %}{% endfor %}""",
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
    assert Tokenizer(tmp_path).render(messages) == theirs


def test_a_template_may_refuse_and_there_may_be_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    plain = Tokenizer(tmp_path)
    assert not plain.has_chat_template
    assert plain.eos_token_id is None
    with pytest.raises(RequestError, match="no chat template"):
        plain.render([{"role": "user", "content": "x"}])
    config = {
        "chat_template": [{"name": "default", "template": "{{ raise_exception('only user') }}"}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="only user"):
        Tokenizer(tmp_path).render([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ArtifactError, match="chat template"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("contents", [None, "{}", "no json"])
def test_no_tokenizer_that_can_be_read(tmp_path: Path, contents: str | None) -> None:
    if contents is not None:
        (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


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
