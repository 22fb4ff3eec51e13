"""Continue a text with optimum-onnx: `python with_optimum.py FOLDER "Once upon"`."""

import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

import onnxruntime as ort

folder, options = sys.argv[1], ort.SessionOptions()
for library in Path(folder).glob("*.so"):  # the native op
    options.register_custom_ops_library(str(library))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, use_io_binding=False)
prompt = tokenizer(sys.argv[2], return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
sys.stdout.write(tokenizer.decode(tokens[0], skip_special_tokens=True) + "\n")
