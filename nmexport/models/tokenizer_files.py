"""Writes tokenizer files that older clients read as well."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

_CONFIG = "tokenizer_config.json"
# What transformers 5 calls the class that transformers 4 calls otherwise; 5 knows both names.
_OLD_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the tokenizer into an existing folder, without paths of this machine."""
    tokenizer.save_pretrained(output)
    path = output / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in _OF_THIS_MACHINE:
        config.pop(key, None)
    config["tokenizer_class"] = _OLD_NAMES.get(
        config.get("tokenizer_class"), config.get("tokenizer_class")
    )
    # Else a client's generic tokenizer class adds token_type_ids, which the graph does not take.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 expects a mapping under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
