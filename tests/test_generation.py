"""Generated text: whole characters, exact stops, draws that repeat."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.bench.engines import bench_engines
from nmexport.errors import ArtifactError, UserError
from nmexport.generation.loop import (
    continuation,
    encode_prompt,
    end_tokens,
    generate,
    load_tokenizer,
    text_pieces,
    until_stop,
)
from nmexport.generation.sampler import Sampler
from nmexport.progress import Silent

from tests.served import engine_document
from tests.tiny import save_tokenizer
from tests.toy_lm import VOCABULARY, expected_logits, save_toy_lm

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "naïve façade, 日本語, 👩🏽‍🚀 and ∑; spaces  too"


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
    engine = tmp_path / "engine" / "current"
    engine.mkdir(parents=True)
    models = dict.fromkeys(("model", "dense_model"), "../../export/model.onnx")
    document = engine_document(**models)
    (engine / "engine.json").write_text(json.dumps(document))
    return tmp_path


def test_pieces_are_whole_characters_and_lose_nothing(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer(TEXT)["input_ids"]
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > len(TEXT) / 2  # streamed, not saved up


def test_text_that_ends_inside_a_character_is_not_swallowed(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer("ab日")["input_ids"]
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


def test_draws_repeat_and_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7], dtype=np.float32))
    first, second = (Sampler(temperature=1.0, seed=3) for _ in range(2))
    draws = [first(logits) for _ in range(2000)]
    assert draws == [second(logits) for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(draws) / 2000, [0.1, 0.2, 0.7], atol=0.04)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.4, 0.3], dtype=np.float32))
    by_count = Sampler(temperature=1.0, top_k=2)
    by_mass = Sampler(temperature=1.0, top_p=0.5)
    certain = Sampler(temperature=1.0, top_p=1e-9)
    assert {by_count(logits) for _ in range(200)} == {2, 3}
    assert {by_mass(logits) for _ in range(200)} == {2, 3}
    assert {certain(logits) for _ in range(50)} == {2}


def test_end_tokens_come_from_all_places(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert end_tokens(tmp_path, load_tokenizer(tokenizer_folder)) == {2, 7, 8, 9}


def test_an_end_token_ends_the_text_unseen() -> None:
    class Counting:
        vocabulary_size = 9

        def prefill(self, ids: np.ndarray) -> np.ndarray:
            return np.eye(9, dtype=np.float32)[(ids + 1) % 9]

        decode_step = prefill

    tokens = continuation(Counting(), [0, 1], Sampler(), max_tokens=20, ends=frozenset({5}))
    assert list(tokens) == [2, 3, 4]


def test_generate_is_greedy_on_the_real_cache(work: Path) -> None:
    tokenizer = load_tokenizer(work / "export")
    ids = encode_prompt(tokenizer, "\x02\x03", chat=False)
    ids = [token % VOCABULARY for token in ids]
    prompt = tokenizer.decode(ids)
    given = "".join(generate(work, prompt, max_tokens=5))
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
        generate(work, "a", **options)


def test_no_engine_says_so_before_the_first_piece(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        generate(tmp_path, "a")


def test_no_tokenizer_says_so(work: Path, tmp_path: Path) -> None:
    for file in (work / "export").glob("*token*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="tokenizer"):
        generate(work, "a")


def test_chat_needs_a_template(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    with pytest.raises(UserError, match="chat template"):
        encode_prompt(tokenizer, "hello", chat=True)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"
    ids = encode_prompt(tokenizer, "hello", chat=True)
    assert tokenizer.decode(ids) == "[user]hello>"


def test_an_empty_prompt_starts_the_text(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert encode_prompt(tokenizer, "", chat=False) == [tokenizer.bos_token_id]
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no tokens"):
        encode_prompt(tokenizer, "", chat=False)


def test_bench_times_both_sides(work: Path) -> None:
    report = bench_engines(
        work, prefill_tokens=8, decode_context=4, batch=2, runs=5, warmup=1, progress=Silent()
    )
    assert report["dense"]["prefill"]["tokens"] == 8
    assert report["sparse"]["decode"]["batch"] == 2
    assert report["sparse"]["decode"]["context"] == 4
    assert len(report["dense"]["decode"]["samples_ms"]) == 5
    low, high = report["speedup"]["decode_interval"]
    assert 0 < low <= report["speedup"]["decode"] <= high
