"""llama.cpp as one side of `rival.py`: runs a task for each line it reads, and prints its times.

It runs in an environment of its own, which has llama-cpp-python; nothing of nmexport is imported.

    {"task": "decode", "sequences": 1, "steps": 8}  ->  [7.1, 7.2, ...]   milliseconds of each step
    {"task": "prompt"}                              ->  [181.0]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp as llama

# Numbers that llama.cpp gives its file types.
FORMATS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}


def requantised(gguf: Path, name: str, threads: int) -> Path:
    """The file in a format: itself where its name says so, else a copy made once."""
    if f".{name}." in gguf.name:
        return gguf
    out = Path(tempfile.gettempdir()) / f"{gguf.stem}-{name}.gguf"
    if not out.is_file():
        how = llama.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread, how.pure = FORMATS[name], True, threads, True
        if llama.llama_model_quantize(str(gguf).encode(), str(out).encode(), ctypes.byref(how)):
            sys.exit(f"llama.cpp cannot write {gguf} in {name}")
    return out


class Model:
    """A model, with a context of several sequences that all begin with the same tokens."""

    def __init__(self, path: Path, *, threads: int, beginning: int) -> None:
        """Load it."""
        how = llama.llama_model_default_params()
        how.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(path).encode(), how)
        self._threads = threads
        self._beginning = beginning
        self._contexts: dict[int, ctypes.c_void_p] = {}

    def decode(self, sequences: int, steps: int) -> list[float]:
        """Decode steps of so many sequences together, after the beginning."""
        if sequences not in self._contexts:
            self._contexts[sequences] = self._context(sequences)
            for sequence in range(sequences):
                self._run(sequences, range(self._beginning), [sequence] * self._beginning)
        at = range(self._beginning, self._beginning + steps)
        took = [self._run(sequences, [p] * sequences, range(sequences)) for p in at]
        memory = llama.llama_get_memory(self._contexts[sequences])
        for sequence in range(sequences):
            llama.llama_memory_seq_rm(memory, sequence, self._beginning, -1)
        return took

    def prompt(self) -> list[float]:
        """The beginning, as a prompt of one sequence."""
        self._contexts[0] = self._context(1)
        took = self._run(0, range(self._beginning), [0] * self._beginning)
        llama.llama_free(self._contexts.pop(0))
        return [took]

    def _context(self, sequences: int) -> ctypes.c_void_p:
        how = llama.llama_context_default_params()
        how.n_ctx, how.n_seq_max = 512 * sequences, sequences
        how.n_batch = how.n_ubatch = 512
        how.n_threads = how.n_threads_batch = self._threads
        return llama.llama_init_from_model(self._model, how)

    def _run(self, context: int, positions: range | list[int], of: range | list[int]) -> float:
        count = len(positions)
        batch = llama.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        together = len(set(of)) > 1
        for i, (position, sequence) in enumerate(zip(positions, of, strict=True)):
            batch.token[i], batch.pos[i] = 500 + 7 * i, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = int(together or i == count - 1)
        began = time.perf_counter()
        failed = llama.llama_decode(self._contexts[context], batch)
        llama.llama_synchronize(self._contexts[context])
        took = (time.perf_counter() - began) * 1e3
        llama.llama_batch_free(batch)
        if failed:
            sys.exit(f"llama_decode returned {failed}")
        return took


def main() -> None:
    """Answer tasks until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--beginning", type=int, required=True, help="tokens before a step")
    options = parser.parse_args()
    llama.llama_log_set(_SILENT, ctypes.c_void_p(0))
    path = requantised(options.gguf, options.format, options.threads)
    model = Model(path, threads=options.threads, beginning=options.beginning)
    sys.stdout.write(json.dumps({"bytes": path.stat().st_size}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        task = json.loads(line)
        if task["task"] == "prompt":
            took = model.prompt()
        else:
            took = model.decode(task["sequences"], task["steps"])
        sys.stdout.write(json.dumps(took) + "\n")
        sys.stdout.flush()


@llama.llama_log_callback
def _SILENT(_level: int, _text: bytes, _data: object) -> None:  # noqa: N802 - must outlive the call
    """Drop llama.cpp's own messages."""


if __name__ == "__main__":
    main()
