"""The exported folder in optimum's `ORTModelForCausalLM`, which wants another transformers.

Set NMEXPORT_OPTIMUM_PYTHON to the Python of an environment with `optimum-onnx` and `onnxruntime`.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nmexport.models.loader import load_tokenizer
from nmexport.models.source import resolve
from nmexport.models.tokenizer_files import write_tokenizer
from nmexport.recipe import ModelSection
from nmexport.stages.exporting import write_configs

from tests.support.exported import export_folder, onnx_logits, positions_of

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = ["Keep the largest scores", "fox"]
NEW_TOKENS = 8
SCRIPT = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder, prompts, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
tokens = model.generate(
    **batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
)
print(json.dumps({"mask": batch["attention_mask"].tolist(), "tokens": tokens.tolist()}))
"""


def test_the_tokenizer_names_what_the_graph_takes(tiny_llama: Path, tmp_path: Path) -> None:
    """A client's generic tokenizer class would add token_type_ids."""
    write_tokenizer(load_tokenizer(resolve(ModelSection(id=str(tiny_llama)))), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert config["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.slow
def test_generates_with_optimum(tiny_llama: Path, tmp_path: Path) -> None:
    """A padded batch generates the tokens that ONNX Runtime's logits ask for."""
    python = os.environ.get("NMEXPORT_OPTIMUM_PYTHON")
    if not python:
        pytest.skip("NMEXPORT_OPTIMUM_PYTHON is not set")
    exported = export_folder(tiny_llama, tmp_path)
    write_configs(exported.dense, tmp_path)
    write_tokenizer(load_tokenizer(resolve(ModelSection(id=str(tiny_llama)))), tmp_path)
    command = [python, "-c", SCRIPT, str(tmp_path), json.dumps(PROMPTS), str(NEW_TOKENS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])

    tokens = np.array(answer["tokens"])
    mask = np.ones_like(tokens)
    prompt = np.array(answer["mask"])
    mask[:, : prompt.shape[1]] = prompt
    assert (mask == 0).any(), "the prompts differ in length"
    assert positions_of(mask).max() < tokens.shape[1]
    logits = onnx_logits(exported.model, tokens, mask, prefill=prompt.shape[1])
    logits[..., 2] = -np.inf  # the end token, which min_new_tokens forbids
    np.testing.assert_array_equal(
        logits[:, prompt.shape[1] - 1 : -1].argmax(-1), tokens[:, prompt.shape[1] :]
    )
