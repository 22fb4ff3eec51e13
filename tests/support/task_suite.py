"""A folder of local tasks: choices, a text to score, a text to continue; no network needed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CHOICE, ROLLING, CONTINUE = "local_choice", "local_rolling", "local_continue"

_QUESTIONS: list[dict[str, Any]] = [
    {"question": "The quick brown fox jumps over the", "choices": [" lazy dog", " model", " key"]},
    {"question": "A model reads", "choices": [" weights that meet", " fox", " the lazy dog."]},
    {"question": "Keep the largest", "choices": [" scores", " dog", " quick brown", " zero"]},
    {"question": "near-zero", "choices": [" activations", " group"]},
    {"question": "every group, per", "choices": [" token", " model", " fox"]},
    {"question": "", "choices": ["The quick", "weights"]},
]
_TEXTS = [
    "The quick brown fox jumps over the lazy dog. Keep the largest scores of every group.",
    "A model reads weights that meet near-zero activations. " * 12,
    "per token",
]

_DATA = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
"""
_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
_CONTINUE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_suite(folder: Path) -> Path:
    """Write the three tasks and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [{**row, "answer": 0} for row in _QUESTIONS]
    for name, rows in (
        ("questions", questions),
        ("prompts", [row for row in questions if row["question"]]),
        ("texts", [{"text": text} for text in _TEXTS]),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for task, data, body in (
        (CHOICE, "questions", _CHOICE),
        (ROLLING, "texts", _ROLLING),
        (CONTINUE, "prompts", _CONTINUE),
    ):
        text = f"task: {task}\n{_DATA.format(file=f'{data}.jsonl').lstrip()}{body.lstrip()}"
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    return folder
