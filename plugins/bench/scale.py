"""Builds a random Llama of 1 or 7 billion parameters, and says what each stage holds in memory.

    python -m plugins.bench.scale --size 7b --folder FOLDER --calib TEXT.txt

Run where this repository lies. Weights are random bfloat16 in safetensors shards, the tokenizer is
SmolLM2's. Each stage runs in a process of its own, layer by layer, and is watched from outside:
the peak resident set counts mapped files, the peak of anonymous memory does not. Options that this
command does not know go to every stage. `FOLDER/memory.json` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.large import SHAPES, WIDE, save_large_model

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 2},
    "1b": SHAPES,
    "7b": {**WIDE, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
STAGES = ("calibrate", "fold", "export", "engine", "verify", "package")
# Nothing is learned: what the stages themselves hold.
METHOD = ("--criterion", "act", "--mitigation", "var", "--grouping", "balanced")
SAMPLES = ("--calib-self-share", "0", "--calib-samples", "2", "--calib-length", "64")
_ROUND = 64  # vocabularies are multiples of this
_EVERY = 0.05  # seconds between two looks at a process


def write_model(folder: Path, size: str) -> None:
    """Write the model, once."""
    from nmexport.models.loader import load_tokenizer
    from nmexport.models.source import resolve as find
    from nmexport.recipe import resolve

    if (folder / "tokenizer_config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(find(resolve("smollm2").model))
    vocabulary = -(-len(tokenizer) // _ROUND) * _ROUND
    save_large_model(folder, **{**SIZES[size], "vocab_size": vocabulary})
    tokenizer.save_pretrained(folder)


def watch(command: Sequence[str]) -> dict[str, Any]:
    """Run a command; its seconds, and the most bytes it held.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    began = time.monotonic()
    process = subprocess.Popen(command)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        for name, held in _memory_of(process.pid).items():
            peaks[name] = max(peaks[name], held)
        time.sleep(_EVERY)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_bytes": peaks["VmHWM"],
        "peak_anonymous_bytes": peaks["RssAnon"],
    }


def _memory_of(pid: int) -> dict[str, int]:
    """What the kernel says a process holds; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {
        name: 1024 * int(value.split()[0])
        for name, _, value in fields
        if name in {"VmHWM", "RssAnon"}
    }


def measure(options: argparse.Namespace, more: Sequence[str]) -> dict[str, Any]:
    """Run every stage up to the last one asked for."""
    from nmexport.inspect.estimate import parameter_count
    from nmexport.models.source import resolve as find
    from nmexport.recipe import ModelSection

    model = options.folder / "model"
    write_model(model, options.size)
    common = ["--model", str(model), "--work", str(options.folder / "work"), *METHOD, *SAMPLES]
    common += ["--calib", str(options.calib), "--eval-data", str(options.calib), *more]
    stages = STAGES[: STAGES.index(options.last) + 1]
    parameters = parameter_count(find(ModelSection(id=str(model))))
    rows: dict[str, Any] = {}
    for stage in stages:
        command = [sys.executable, "-m", "nmexport", "build", "--to", stage]
        command += ["--offload", "layerwise", *common]
        rows[stage] = watch(command)
        rows[stage]["peak_rss_bytes_a_parameter"] = round(
            rows[stage]["peak_rss_bytes"] / parameters, 3
        )
        report = {"size": options.size, "parameters": parameters, "options": more, "stages": rows}
        text = json.dumps(report, indent=1) + "\n"
        (options.folder / "memory.json").write_text(text, encoding="utf-8")
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model, run the stages, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--folder", type=Path, required=True, help="model, build and figures")
    parser.add_argument("--calib", type=Path, required=True, help="a text file")
    parser.add_argument("--to", dest="last", choices=STAGES, default="export", help="last stage")
    options, more = parser.parse_known_args(arguments)
    try:
        report = measure(options, more)
    except subprocess.CalledProcessError as error:  # the stage has said why
        sys.exit(error.returncode)
    for stage, row in report["stages"].items():
        rss, anonymous = (row[f"peak_{kind}_bytes"] / 1e9 for kind in ("rss", "anonymous"))
        sys.stdout.write(
            f"{stage}: {row['seconds']:.0f} s, peak {rss:.2f} GB resident, "
            f"{anonymous:.2f} GB of it not mapped from files\n"
        )


if __name__ == "__main__":
    main()
