"""Measures a model's memory while it runs, in a fresh process that does nothing else.

Run as `python -m nmexport.verification.memory ENGINE_JSON sparse|dense PROMPT_TOKENS` it prints
one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.errors import UserError
from nmexport.progress import peak_rss_bytes
from nmexport.report.model import Memory, PeakMemory
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_session, why_not_here
from nmexport.store.records import json_from, record_from

if TYPE_CHECKING:
    from nmexport.runtimes.engine import Side

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_DECODE_STEPS = 4

PROTOCOL = (
    "A fresh process opens one model with ONNX Runtime, prefills one prompt, decodes four tokens "
    "and reports its own peak resident set. Weights are mapped from the artifact's files, so "
    "pages that were read count; on a CPU those of sparse linears are copied into huge pages "
    "where they take a quarter of the free memory at most."
)


def run_in_fresh_process(engine: Path, side: Side, *, prompt_tokens: int) -> PeakMemory:
    """Peak memory of one model.

    Args:
        engine: `engine.json`.
        side: Which model.
        prompt_tokens: Length of the prompt.

    Returns:
        The peak, or why there is none.
    """
    paths = [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", __name__, str(engine), side, str(prompt_tokens)]
    done = subprocess.run(  # noqa: S603 - our own module, no shell
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        why = f"the measuring process ended with code {done.returncode}: {last[0]}"
        return PeakMemory(why=why)
    return record_from(PeakMemory, json.loads(done.stdout))


def measure(engine: Path, side: Side, *, prompt_tokens: int) -> PeakMemory:
    """Run one model in this process and return its memory."""
    import numpy as np

    with open_session(engine, side=side, elsewhere=True) as session:
        rng = np.random.default_rng(0)
        session.prefill(rng.integers(session.vocabulary_size, size=(1, prompt_tokens)))
        for _ in range(_DECODE_STEPS):
            session.decode_step(np.zeros((1, 1), np.int64))
    return PeakMemory(peak_rss_bytes=peak_rss_bytes())


def measure_engine(
    engine: Path, *, export: Path, prompt_tokens: int, why_no_dense: str | None = None
) -> Memory:
    """Measure both models, each in a process of its own.

    Args:
        engine: `engine.json`.
        export: Folder of the exported model.
        prompt_tokens: Length of the prompt that is run.
        why_no_dense: Why there is no baseline; None where there is one.
    """
    sparse = run_in_fresh_process(engine, "sparse", prompt_tokens=prompt_tokens)
    dense = PeakMemory(why=why_no_dense)
    if why_no_dense is None:
        dense = run_in_fresh_process(engine, "dense", prompt_tokens=prompt_tokens)
    return Memory(
        **vars(sparse),
        why_no_device_bytes="the memory that a GPU's driver hands out is not measured"
        if _runs_on_gpu(engine)
        else "the model runs on the CPU and takes no device memory",
        artifact_bytes=artifact_bytes(export),
        sparse=sparse,
        dense=dense,
        protocol=PROTOCOL,
    )


def _runs_on_gpu(engine: Path) -> bool:
    described = read_engine(engine)
    if described.tensorrt is None or why_not_here(engine) is not None:
        return described.provider == "cuda"
    return True


def artifact_bytes(folder: Path) -> int:
    """Return the size of a model's shipped files, without the dense baseline."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and "dense" not in path.relative_to(folder).parts
    )


def answer(engine: str, side: str, prompt_tokens: str) -> PeakMemory:
    """Measure the model that the command line names, or say why that fails."""
    try:
        which: Side = "dense" if side == "dense" else "sparse"
        return measure(Path(engine), which, prompt_tokens=int(prompt_tokens))
    except UserError as error:
        return PeakMemory(why=error.problem)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_from(answer(*sys.argv[1:]))))
