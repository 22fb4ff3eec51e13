"""Continue a text with plain ONNX Runtime: `python with_onnxruntime.py FOLDER "Once upon"`."""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import onnxruntime as ort

folder, options = Path(sys.argv[1]), ort.SessionOptions()
for library in folder.glob("*.so"):  # the native op
    options.register_custom_ops_library(str(library))
session = ort.InferenceSession(folder / "model.onnx", options)
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokens = step = tokenizer.encode(sys.argv[2]).ids
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
cache = {
    one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type])
    for one in session.get_inputs()
    if one.name.startswith("past")
}
for _ in range(20):
    total = len(tokens)
    position_ids = np.arange(total - len(step), total)[None]
    mask = np.ones((1, total), np.int64)
    inputs = {"input_ids": np.array([step]), "attention_mask": mask, "position_ids": position_ids}
    logits, *present = session.run(None, {**inputs, **cache})
    cache = dict(zip(cache, present, strict=True))
    step = [int(logits[0, -1].argmax())]
    tokens = tokens + step
sys.stdout.write(tokenizer.decode(tokens) + "\n")
