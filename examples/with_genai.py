"""Continue a text with onnxruntime-genai: `python with_genai.py FOLDER "Once upon"`."""

import sys

import onnxruntime_genai as og
from tokenizers import Tokenizer

model = og.Model(sys.argv[1])  # its genai_config.json names the native op
tokenizer = Tokenizer.from_file(f"{sys.argv[1]}/tokenizer.json")
tokens = tokenizer.encode(sys.argv[2]).ids
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(tokens) + 20, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
sys.stdout.write(tokenizer.decode(generator.get_sequence(0).tolist()) + "\n")
