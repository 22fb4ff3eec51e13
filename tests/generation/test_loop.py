"""Generated text: whole characters, exact stops, draws that repeat."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.errors import ArtifactError, UserError
from nmexport.generation.defaults import end_tokens
from nmexport.generation.loop import (
    continuation,
    encode_prompt,
    generate,
    text_pieces,
    until_stop,
)
from nmexport.generation.options import GenerationOptions
from nmexport.generation.sampler import Sampler
from nmexport.generation.tokenizer import Tokenizer

from tests.serving.test_scheduler import CountingSession
from tests.support.served import engine_document
from tests.support.tiny import begin_every_text, save_tokenizer
from tests.support.toy_lm import VOCABULARY, expected_logits, save_toy_lm

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "naïve façade, 日本語, 👩🏽‍🚀 and ∑; spaces  too"

CONTEXT = 512


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A work directory with the toy model as both sparse and dense, its byte tokens unprintable."""
    export = tmp_path / "export"
    save_toy_lm(export / "model.onnx")
    for file in tokenizer_folder.iterdir():
        (export / file.name).write_bytes(file.read_bytes())
    context = {"model": {"context_length": CONTEXT}}
    (export / "genai_config.json").write_text(json.dumps(context))
    engine = tmp_path / "engine" / "current"
    engine.mkdir(parents=True)
    models = dict.fromkeys(("model", "dense_model"), "../../export/model.onnx")
    document = engine_document(**models)
    (engine / "engine.json").write_text(json.dumps(document))
    return tmp_path


def test_pieces_are_whole_characters_and_lose_nothing(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    ids = tokenizer.encode(TEXT)
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > len(TEXT) / 2  # streamed, not saved up


def test_text_that_ends_inside_a_character_is_not_swallowed(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    ids = tokenizer.encode("ab日")
    assert "".join(text_pieces(tokenizer, ids[:-1])) == "ab\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["one ", "two ", "three"], ["two"], "one "),
        (["a\n", "\nb"], ["\n\n"], "a"),
        (["aab", "aac"], ["aac"], "aab"),
        (["ends with sto"], ["stop"], "ends with sto"),
        (["x", "yz"], ["yz", "xy"], ""),
        (["all of it"], [], "all of it"),
        (["all of it"], [""], "all of it"),
    ],
)
def test_stop_texts(pieces: list[str], stop: list[str], expected: str) -> None:
    assert "".join(until_stop(pieces, stop)) == expected


def test_stop_text_never_leaks_early() -> None:
    given = []
    for piece in until_stop(iter("hello END never"), ["END"]):
        given.append(piece)
        assert "E" not in piece
    assert "".join(given) == "hello "


def test_greedy_takes_the_first_of_equals() -> None:
    assert Sampler()(np.array([1.0, 3.0, 3.0], dtype=np.float32)) == 1


class Watched(CountingSession):
    """Says which of the two ways to a token was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def extend_last(self, cache: object, input_ids: np.ndarray) -> tuple[np.ndarray, object]:
        self.asked.append("logits")
        return super().extend_last(cache, input_ids)

    def next_tokens(self, cache: object, input_ids: np.ndarray) -> tuple[np.ndarray, object]:
        chosen = super().next_tokens(cache, input_ids)
        self.asked[-1] = "token"
        return chosen


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, "token"),
        ({"top_k": 1, "top_p": 0.5, "seed": 3}, "token"),
        ({"temperature": 0.5, "top_k": 1}, "logits"),
        ({"repetition_penalty": 1.1}, "logits"),
        ({"presence_penalty": 0.1}, "logits"),
        ({"frequency_penalty": -0.1}, "logits"),
    ],
)
def test_logits_are_asked_for_where_more_than_the_likeliest_counts(
    options: dict[str, float], asked: str
) -> None:
    session, sampler = Watched(), Sampler(GenerationOptions(**options))
    tokens = continuation(session, [0, 1], sampler, max_tokens=3, ends=frozenset())
    assert list(tokens) == [2, 3, 4]
    assert session.asked == [asked] * 3


def test_draws_repeat_and_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7], dtype=np.float32))
    first, second = (Sampler(GenerationOptions(temperature=1.0, seed=3)) for _ in range(2))
    draws = [first(logits) for _ in range(2000)]
    assert draws == [second(logits) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(draws) / 2000, [0.1, 0.2, 0.7], atol=0.04)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.4, 0.3], dtype=np.float32))
    by_count = Sampler(GenerationOptions(temperature=1.0, top_k=2, seed=0))
    by_mass = Sampler(GenerationOptions(temperature=1.0, top_p=0.5, seed=0))
    certain = Sampler(GenerationOptions(temperature=1.0, top_p=1e-9, seed=0))
    assert {by_count(logits) for _ in range(200)} == {2, 3}
    assert {by_mass(logits) for _ in range(200)} == {2, 3}
    assert {certain(logits) for _ in range(50)} == {2}


def test_end_tokens_come_from_all_places(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert end_tokens(tmp_path, Tokenizer(tokenizer_folder)) == {2, 7, 8, 9}


def test_an_end_token_ends_the_text_unseen() -> None:
    ends = frozenset({5})
    tokens = continuation(CountingSession(), [0, 1], Sampler(), max_tokens=20, ends=ends)
    assert list(tokens) == [2, 3, 4]


def test_generate_is_greedy_on_the_real_cache(work: Path) -> None:
    tokenizer = Tokenizer(work / "export")
    ids = encode_prompt(tokenizer, "\x02\x03", chat=False)
    ids = [token % VOCABULARY for token in ids]
    prompt = tokenizer.decode(ids)
    given = "".join(generate(work, prompt, GenerationOptions(max_tokens=5)))
    for _ in range(5):
        token = int(expected_logits(np.array([ids]))[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    assert given == tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1e-310},
        {"top_p": 0.0},
        {"top_k": -1},
        {"seed": -1},
    ],
)
def test_options_out_of_range(work: Path, options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        generate(work, "a", GenerationOptions(**options))


def test_no_engine_says_so_before_the_first_piece(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        generate(tmp_path, "a", GenerationOptions())


def test_no_tokenizer_says_so(work: Path, tmp_path: Path) -> None:
    for file in (work / "export").glob("*token*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="tokenizer"):
        generate(work, "a", GenerationOptions())


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A tokenizer's folder that a test may change."""
    return shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")


def change_config(folder: Path, **values: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_chat_needs_a_template(folder: Path) -> None:
    with pytest.raises(UserError, match="chat template"):
        encode_prompt(Tokenizer(folder), "hello", chat=True)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(encode_prompt(tokenizer, "hello", chat=True)) == "[user]hello>"


def test_an_empty_prompt_starts_the_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert encode_prompt(tokenizer, "", chat=False) == [tokenizer.bos_token_id]
    change_config(folder, bos_token=None)
    with pytest.raises(UserError, match="no tokens"):
        encode_prompt(Tokenizer(folder), "", chat=False)


def test_a_prompt_that_begins_the_text_is_not_begun_twice(folder: Path) -> None:
    """By the user or by a chat template, with a tokenizer that begins every text itself."""
    begin_every_text(folder)
    template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(folder)
    assert encode_prompt(tokenizer, "a", chat=False)[:1] == [1]
    for chat, prompt in ((True, "a"), (False, "<s>a")):
        assert encode_prompt(tokenizer, prompt, chat=chat)[:2] == [
            1,
            *tokenizer.encode("<s>a")[1:2],
        ]
        assert encode_prompt(tokenizer, prompt, chat=chat).count(1) == 1


def test_a_prompt_that_is_no_utf8_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        encode_prompt(Tokenizer(folder), "caf\udce9", chat=False)


def test_a_null_byte_is_a_character_like_others(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(encode_prompt(tokenizer, "a\0b", chat=False)) == "a\0b"


def test_a_token_without_a_row_in_the_embedding_is_refused(folder: Path) -> None:
    largest = max(Tokenizer(folder).encode("quick brown fox"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": largest}))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("a b")
    with pytest.raises(UserError, match=f"token {largest}, and the model knows {largest} tokens"):
        tokenizer.encode("quick brown fox")


@pytest.mark.parametrize("value", [-1, "2", True, [2, -1], 2.0, [[2]]])
def test_an_end_token_that_is_none_names_the_file(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ArtifactError, match=r"generation_config\.json: eos_token_id cannot be"):
        end_tokens(folder, Tokenizer(folder))


def test_generate_ends_where_the_context_does(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(work / "export")
    prompt = tokenizer.decode([7, 8])
    assert len(tokenizer.encode(prompt)) == 2
    (work / "export" / "genai_config.json").write_text('{"model": {"context_length": 6}}')
    ended = "".join(generate(work, prompt, GenerationOptions(max_tokens=50)))
    assert "context of 6 tokens is full" in caplog.text
    assert ended == "".join(generate(work, prompt, GenerationOptions(max_tokens=4)))
    with pytest.raises(UserError, match="the model's context is 6"):
        generate(work, prompt * 3, GenerationOptions())
