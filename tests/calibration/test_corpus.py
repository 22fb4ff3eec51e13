"""From text to windows of token ids, and one clear message where there is too little of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from nmexport.calibration.corpus import (
    corpus_identity,
    evaluation_windows,
    load_samples,
    protocol,
    text_prefix,
)
from nmexport.calibration.python_text import python_text
from nmexport.errors import CorpusError, EnvironmentFault
from nmexport.recipe import CorpusSection, EvaluationSection

from tests.support.tiny import begin_every_text

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

TEXT = " ".join(f"Sentence number {index} says {index * index}." for index in range(300))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def never(samples: int, length: int, seed: int) -> NDArray[np.int64]:
    raise AssertionError((samples, length, seed))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def section(corpus: object, samples: int = 4, length: int = 16) -> CorpusSection:
    return CorpusSection(corpus=str(corpus), samples=samples, length=length,
                         self_share=0.0, learning_samples=0)  # fmt: skip


def evaluation(corpus: object, windows: int = 4, length: int = 16) -> EvaluationSection:
    return EvaluationSection(corpus=str(corpus), windows=windows, length=length)


def test_evaluation_takes_the_first_windows_of_the_text_as_it_stands(
    tokenizer: Any, text_file: Path
) -> None:
    windows = evaluation_windows(evaluation(text_file), tokenizer, never, seed=0)
    assert windows.dtype == np.int64
    assert windows.flatten().tolist() == ids_of(tokenizer, TEXT)[:64]


def test_calibration_draws_windows_without_replacement_by_seed(
    tokenizer: Any, text_file: Path
) -> None:
    first = load_samples(section(text_file, 9), tokenizer, never, seed=0).corpus
    again = load_samples(section(text_file, 9), tokenizer, never, seed=0).corpus
    other = load_samples(section(text_file, 9), tokenizer, never, seed=1).corpus
    assert first.shape == (9, 16)
    assert len({tuple(row) for row in first.tolist()}) == 9
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_model_writes_its_share_and_learning_gets_what_is_left(
    tokenizer: Any, text_file: Path
) -> None:
    asked: list[tuple[int, int]] = []

    def write(samples: int, length: int, seed: int) -> NDArray[np.int64]:
        del seed
        asked.append((samples, length))
        return np.full((samples, length), 7)

    shared = section(text_file, 9).model_copy(update={"self_share": 0.4, "learning_samples": 3})
    loaded = load_samples(shared, tokenizer, write, seed=0)
    assert asked == [(4, 16)]
    assert (loaded.corpus.shape, loaded.written.shape) == ((5, 16), (4, 16))
    alone = load_samples(section(text_file, 8), tokenizer, never, seed=0).corpus
    np.testing.assert_array_equal(np.concatenate([loaded.corpus, loaded.further]), alone)
    everything = shared.model_copy(update={"learning_samples": 10_000})
    further = load_samples(everything, tokenizer, write, seed=0).further
    assert len(further) == len(ids_of(tokenizer, TEXT)) // 16 - 5


def test_a_corpus_that_is_too_short_is_refused_before_the_model_writes(
    tokenizer: Any, text_file: Path
) -> None:
    shared = section(text_file, 10_000).model_copy(update={"self_share": 0.5})
    with pytest.raises(CorpusError, match="5000 are needed"):
        load_samples(shared, tokenizer, never, seed=0)


def test_calibration_leaves_reserved_tokens_to_evaluation(tokenizer: Any, text_file: Path) -> None:
    total = len(ids_of(tokenizer, TEXT))
    count = (total - 160) // 16
    loaded = load_samples(section(text_file, count), tokenizer, never, seed=0, reserved_tokens=160)
    drawn = loaded.corpus
    used = evaluation_windows(evaluation(text_file, 10), tokenizer, never, seed=0)
    assert not {tuple(row) for row in drawn.tolist()} & {tuple(row) for row in used.tolist()}
    with pytest.raises(CorpusError, match="evaluation uses the first 160"):
        load_samples(section(text_file, count + 1), tokenizer, never, seed=0, reserved_tokens=160)


def test_a_tokenizer_that_begins_texts_begins_every_window(tokenizer: Any, text_file: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begun = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert text_prefix(begun) == [1]
    assert text_prefix(tokenizer) == []
    windows = evaluation_windows(evaluation(text_file), begun, never, seed=0)
    assert windows.shape == (4, 16)
    assert (windows[:, 0] == 1).all()
    assert windows[:, 1:].flatten().tolist() == ids_of(tokenizer, TEXT)[:60]


def test_documents_are_joined_by_end_of_text(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    lines = [json.dumps({"text": "The lazy dog.", "id": 1}), "", json.dumps({"text": "A fox."})]
    path.write_text("\n".join(lines), encoding="utf-8")
    expected = [
        *ids_of(tokenizer, "The lazy dog."), 2, *ids_of(tokenizer, "A fox."), 2
    ]  # fmt: skip
    windows = evaluation_windows(evaluation(path, 1, len(expected)), tokenizer, never, seed=0)
    assert windows[0].tolist() == expected


def test_chats_go_through_the_models_template(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="no chat template"):
        load_samples(section(path, 1, 8), tokenizer, never, seed=0)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    try:
        expected = [*ids_of(tokenizer, "[user]Why?[assistant]Because."), 2]
        windows = evaluation_windows(evaluation(path, 1, len(expected)), tokenizer, never, seed=0)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(CorpusError, match=r"chats\.jsonl:1.*roles must alternate"):
            load_samples(section(path, 1, 8), tokenizer, never, seed=0)
    finally:
        tokenizer.chat_template = None
    assert windows[0].tolist() == expected


@pytest.mark.parametrize("content", ["", "   \n", "Too short."])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_too_little_text_says_how_much_there_is_and_what_to_change(
    tokenizer: Any, tmp_path: Path, content: str, suffix: str
) -> None:
    path = tmp_path / f"short.{suffix}"
    if suffix == "jsonl" and content.strip():
        content = json.dumps({"text": content})
    path.write_text(content, encoding="utf-8")
    for load, option in (
        (lambda: load_samples(section(path, 3, 64), tokenizer, never, seed=0), "longer text"),
        (
            lambda: evaluation_windows(evaluation(path, 3, 64), tokenizer, never, seed=0),
            "longer text",
        ),
    ):
        with pytest.raises(CorpusError, match=r"has \d+ tokens: 0 whole windows") as caught:
            load()
        assert "192 tokens" in caught.value.problem
        assert option in (caught.value.fix or "")


def test_almost_enough_text_names_the_count_that_would_do(tokenizer: Any, text_file: Path) -> None:
    available = len(ids_of(tokenizer, TEXT)) // 16
    with pytest.raises(CorpusError) as caught:
        load_samples(section(text_file, available + 1), tokenizer, never, seed=0)
    assert f"--calib-samples {available} or less" in (caught.value.fix or "")
    with pytest.raises(CorpusError) as caught:
        evaluation_windows(evaluation(text_file, available + 1), tokenizer, never, seed=0)
    assert f"--eval-windows {available} or less" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "is not JSON"),
        ('{"content": "x"}', "neither text nor messages, but: content"),
        ('["x"]', "neither text nor messages, but: list"),
        ('{"text": 5}', "neither text nor messages"),
    ],
)
def test_a_bad_line_is_named(tokenizer: Any, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line, encoding="utf-8")
    with pytest.raises(CorpusError, match=said) as caught:
        load_samples(section(path), tokenizer, never, seed=0)
    assert "bad.jsonl:2" in caught.value.problem


@pytest.mark.parametrize(
    "corpus", ["missing.txt", "missing.jsonl", "./folder", "/etc", "a/b/c", ""]
)
def test_what_is_not_a_corpus(tokenizer: Any, corpus: str) -> None:
    with pytest.raises(CorpusError) as caught:
        corpus_identity(corpus)
    assert "jsonl" in (caught.value.allowed or "")
    with pytest.raises(CorpusError):
        load_samples(section(corpus), tokenizer, never, seed=0)


def test_text_that_is_not_utf8(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà".encode("latin-1"))
    with pytest.raises(CorpusError, match="UTF-8"):
        load_samples(section(path), tokenizer, never, seed=0)


def test_identity_follows_contents_not_names(text_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT, encoding="utf-8")
    assert corpus_identity(str(copy)) == corpus_identity(str(text_file))
    copy.write_text(TEXT + "!", encoding="utf-8")
    assert corpus_identity(str(copy)) != corpus_identity(str(text_file))
    assert corpus_identity("self") == {"corpus": "self"}


def test_self_text_never_shares_a_seed_between_splits(tokenizer: Any) -> None:
    seeds: list[int] = []

    def record(samples: int, length: int, seed: int) -> NDArray[np.int64]:
        seeds.append(seed)
        return np.zeros((samples, length), dtype=np.int64)

    for seed in (0, 1):
        load_samples(section("self"), tokenizer, record, seed=seed)
        evaluation_windows(evaluation("self"), tokenizer, record, seed=seed)
    assert len(set(seeds)) == 4


def test_protocol_is_stated_for_every_form(text_file: Path) -> None:
    assert "as it stands" in protocol(evaluation(text_file, 16, 512))
    assert "16 windows of 512 tokens" in protocol(evaluation(text_file, 16, 512))
    assert "without replacement" in protocol(section(text_file))
    assert "generates itself" in protocol(section("self"))
    assert "empty line" in protocol(section("owner/name"))


# -- the hub, in its place a module that behaves as `datasets` does -----------------------------


def hub(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(**functions))


def test_hub_rows_are_streamed_only_as_far_as_needed(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    taken: list[int] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("owner/name", "small", "test", True)
        for index in range(100_000):
            taken.append(index)
            yield {"text": f"Row {index} of many."}

    hub(
        monkeypatch,
        get_dataset_split_names=lambda *_: ["train", "test"],
        load_dataset=load,
    )
    windows = evaluation_windows(evaluation("owner/name:small"), tokenizer, never, seed=0)
    assert windows[0].tolist() == ids_of(tokenizer, "Row 0 of many.\n\nRow 1 of many.")[:16]
    assert len(taken) < 200


def test_a_hub_dataset_can_be_too_short(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    hub(
        monkeypatch,
        get_dataset_split_names=lambda *_: ["only"],
        load_dataset=lambda *_, **__: [{"text": "One row."}],
    )
    with pytest.raises(CorpusError, match="0 whole windows"):
        load_samples(section("owner/name"), tokenizer, never, seed=0)


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (ConnectionError("Couldn't reach the Hub"), EnvironmentFault),
        (FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"), CorpusError),
        (FileNotFoundError("Couldn't reach 'owner/name' on the Hub"), EnvironmentFault),
        (ValueError("Config name is missing. Please pick one among: a, b"), CorpusError),
    ],
)
def test_hub_faults(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, raised: Exception, error: type[Exception]
) -> None:
    def fail(*_: object) -> list[str]:
        raise raised

    hub(monkeypatch, get_dataset_split_names=fail)
    with pytest.raises(error, match="owner/name"):
        load_samples(section("owner/name"), tokenizer, never, seed=0)


def test_a_missing_datasets_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match="datasets package") as caught:
        load_samples(section("owner/name"), tokenizer, never, seed=0)
    assert "nmexport[hub]" in (caught.value.fix or "")


def first_window(tokenizer: Any, corpus: object, length: int) -> list[int]:
    """All tokens of a corpus, as the first `length` of one window."""
    windows = evaluation_windows(evaluation(corpus, 1, length), tokenizer, never, seed=0)
    return list(windows[0])


def write_lines(path: Path, *rows: object, mark: str = "") -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes((mark + "\n".join(lines)).encode())
    return path


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c", "\r"])
def test_a_document_may_hold_what_python_calls_a_line_end(
    tokenizer: Any, tmp_path: Path, end: str
) -> None:
    text = f"one{end}two and more of it"
    path = tmp_path / "a.jsonl"
    # JSON allows these raw, but for control characters.
    raw = json.dumps({"text": text}, ensure_ascii=False)
    path.write_bytes(raw.encode() + b"\r\n" + raw.encode())
    expected = ids_of(tokenizer, text)
    assert first_window(tokenizer, path, len(expected)) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tokenizer: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = TEXT if name == "a.txt" else json.dumps({"text": TEXT})
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert first_window(tokenizer, path, 16) == ids_of(tokenizer, TEXT)[:16]


def test_joined_files_keep_their_byte_order_marks_to_themselves(
    tokenizer: Any, tmp_path: Path
) -> None:
    line = "\ufeff" + json.dumps({"text": TEXT}) + "\n"
    path = tmp_path / "a.jsonl"
    path.write_text(line * 2, encoding="utf-8")
    assert first_window(tokenizer, path, 16) == ids_of(tokenizer, TEXT)[:16]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'{"text": "a\ud83d"}', r"a\.jsonl:2 holds half a character: \\ud83d"),
        (r'{"text": "\udca9\ud83d b"}', r"half a character: \\udca9"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "not JSON"),
        ("nan", "not JSON"),
        ("3", "neither text nor messages"),
    ],
)
def test_what_json_can_spell_and_text_cannot_be(
    tokenizer: Any, tmp_path: Path, line: str, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n" + line)
    for read in (
        lambda: evaluation_windows(evaluation(path), tokenizer, never, seed=0),
        lambda: load_samples(section(path), tokenizer, never, seed=0),
    ):
        with pytest.raises(CorpusError, match=said):
            read()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_utf16_is_not_learned_as_nulls(
    tokenizer: Any, tmp_path: Path, name: str, encoding: str
) -> None:
    path = tmp_path / name
    path.write_bytes(json.dumps({"text": TEXT}).encode(encoding))
    with pytest.raises(CorpusError, match="is UTF-16 text, or no text") as caught:
        evaluation_windows(evaluation(path), tokenizer, never, seed=0)
    assert caught.value.fix == "convert it to UTF-8"


def test_a_null_in_a_text_is_a_character(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"{TEXT}\0{TEXT}")
    assert first_window(tokenizer, path, 16) == ids_of(tokenizer, TEXT)[:16]


@pytest.mark.parametrize("name", ["A.TXT", "a.JSONL"])
def test_a_suffix_in_upper_case_is_the_same(tokenizer: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(TEXT if name == "A.TXT" else json.dumps({"text": TEXT}))
    assert first_window(tokenizer, path, 16) == ids_of(tokenizer, TEXT)[:16]


def test_a_folder_called_like_a_text_is_told_from_a_missing_one(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(CorpusError, match=r"a\.jsonl is no ordinary file"):
        evaluation_windows(evaluation(tmp_path / "a.jsonl"), tokenizer, never, seed=0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": None}, "text of type NoneType"),
        ({"id": 1, "text": ["a"]}, "id, text of type list"),
        ({"messages": "hi"}, "messages of type str"),
    ],
)
def test_a_key_with_another_kind_of_value_says_which(
    tokenizer: Any, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", row)
    with pytest.raises(CorpusError, match=said):
        evaluation_windows(evaluation(path), tokenizer, never, seed=0)


MESSAGES = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes, hello."}]


@pytest.fixture
def chatty(tiny_llama: Path, tmp_path: Path) -> Any:
    """A tokenizer that begins every text, and a template that begins and ends it too."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_llama, tmp_path / "chatty")
    begin_every_text(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}</s>\n"
    )
    return tokenizer


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_a_template_begins_and_ends_is_not_begun_and_ended_again(
    chatty: Any, tmp_path: Path, count: int
) -> None:
    path = write_lines(tmp_path / "chat.jsonl", *[{"messages": MESSAGES}] * 40)
    assert text_prefix(chatty) == [1]
    windows = evaluation_windows(evaluation(path, 8, 8 + count), chatty, never, seed=0)
    assert (windows[:, 0] == 1).all()
    document = ids_of(chatty, chatty.apply_chat_template(MESSAGES, tokenize=False))
    assert (document[0], document.count(2)) == (1, 1)
    for row in windows.tolist():
        assert row[1] != 1
        text = chatty.decode(row)
        assert "<s><s>" not in text.replace(" ", "")
        assert "</s></s>" not in text.replace(" ", "").replace("\n", "")
    whole = first_window(chatty, path, 2 * len(document))
    assert whole == document * 2


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "Hello."}], ["Hello."], None, 3, {"text": "Hello."}]
)
def test_content_that_is_no_text_is_refused(chatty: Any, tmp_path: Path, content: object) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": content}]})
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: messages holds"):
        evaluation_windows(evaluation(path), chatty, never, seed=0)


def test_a_call_of_a_tool_needs_no_content(chatty: Any, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    path = write_lines(tmp_path / "a.jsonl", {"messages": [*MESSAGES, call]})
    assert first_window(chatty, path, 8)


@pytest.mark.parametrize("wrong", ["{{ 1 // 0 }}", "{{ messages.no.such }}", "{{ [1] < 'a' }}"])
def test_whatever_a_template_raises_names_the_line(chatty: Any, tmp_path: Path, wrong: str) -> None:
    chatty.chat_template = wrong
    path = write_lines(tmp_path / "a.jsonl", {"messages": MESSAGES})
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: the chat template refuses it"):
        evaluation_windows(evaluation(path), chatty, never, seed=0)


def test_tokens_that_the_model_does_not_know_are_refused(tokenizer: Any, text_file: Path) -> None:
    largest = max(ids_of(tokenizer, TEXT))
    for read in (
        lambda size: evaluation_windows(
            evaluation(text_file), tokenizer, never, seed=0, vocabulary=size
        ),
        lambda size: load_samples(section(text_file), tokenizer, never, seed=0, vocabulary=size),
    ):
        read(largest + 1)
        with pytest.raises(CorpusError, match=f"token {largest}, and the model knows {largest}"):
            read(largest)


def test_a_home_folder_in_a_recipe_is_expanded(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert section("~/text.txt").corpus == evaluation("~/text.txt").corpus == str(text_file)
    assert section("~nobody-of-that-name/x.txt").corpus == "~nobody-of-that-name/x.txt"


def test_text_that_comes_with_python_is_of_two_kinds_and_the_same_each_time(tokenizer: Any) -> None:
    text = python_text()
    assert text == python_text()
    assert "class TextWrapper:" in text
    assert "Special method names" in text
    windows = evaluation_windows(evaluation("python", 3), tokenizer, never, seed=0)
    assert windows.flatten().tolist() == ids_of(tokenizer, text)[:48]
    drawn = load_samples(section("python", 5), tokenizer, never, seed=0, reserved_tokens=48)
    held_out = {tuple(row) for row in windows.tolist()}
    assert not held_out & {tuple(row) for row in drawn.corpus.tolist()}
    identity = corpus_identity("python")
    assert identity["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert "come with Python" in protocol(section("python", 5))
