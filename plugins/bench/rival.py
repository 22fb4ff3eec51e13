"""Times a work directory's models beside llama.cpp on the same weights, all in turns, in one run.

    python3 -m venv llama && llama/bin/pip install llama-cpp-python      # compiles for some minutes
    python plugins/bench/rival.py WORK --gguf FILE.gguf --python llama/bin/python

`WORK` is a work directory whose engine is built from that very file. Sides are all that it holds
(dense float, dense in integers, sparse) and llama.cpp in each `--format`. Reported are medians with
10th and 90th percentile, in milliseconds: one token after 128, a prompt of 128, and a step of 8
sequences; losses too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from nmexport.environment import probe
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_session
from nmexport.runtimes.session import Work
from nmexport.timing import interleave, milliseconds, percentiles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nmexport.runtimes.session import Session, Stepped

BEGINNING = 128
TOGETHER = 8
STEPS = 8
"""Steps that a side takes in its turn."""


class Side(Protocol):
    """One model on one runtime."""

    def decode(self, sequences: int) -> list[float]:
        """Milliseconds of each of some steps of so many sequences, all after the beginning."""

    def prompt(self) -> list[float]:
        """Milliseconds of the beginning as a prompt."""


class Ours:
    """A session of nmexport."""

    def __init__(self, session: Session) -> None:
        """Run the beginning."""
        self._session = session
        self._ids = np.random.default_rng(0).integers(100, 40000, (1, BEGINNING))
        self._cache = session.extend(None, self._ids)[1]

    def decode(self, sequences: int) -> list[float]:
        """See `Side`; caches are kept, so every turn goes on from the same one."""
        caches = [self._cache] * sequences
        took = []
        for _ in range(STEPS):
            tokens = [np.array([500 + i]) for i in range(sequences)]
            work = [Work(cache, ids) for cache, ids in zip(caches, tokens, strict=True)]
            done: list[Stepped] = []
            took.append(milliseconds(lambda work=work, done=done: done.extend(self._step(work))))
            caches = [one.cache for one in done]
        return took

    def prompt(self) -> list[float]:
        """See `Side`."""
        return [milliseconds(lambda: self._session.extend_last(None, self._ids))]

    def _step(self, work: list[Work]) -> list[Stepped]:
        return self._session.step(work)


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, gguf: Path, form: str, threads: int) -> None:
        """Start it."""
        worker = Path(__file__).with_name("llama_worker.py")
        options = ["--format", form, "--threads", str(threads), "--beginning", str(BEGINNING)]
        self._process = subprocess.Popen(
            [str(python), str(worker), str(gguf), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.size = int(self._answer()["bytes"])

    def decode(self, sequences: int) -> list[float]:
        """See `Side`."""
        return self._ask({"task": "decode", "sequences": sequences, "steps": STEPS})

    def prompt(self) -> list[float]:
        """See `Side`."""
        return self._ask({"task": "prompt"})

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, task: dict[str, Any]) -> list[float]:
        assert self._process.stdin is not None  # noqa: S101 - opened as a pipe
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        took: list[float] = self._answer()
        return took

    def _answer(self) -> Any:
        assert self._process.stdout is not None  # noqa: S101 - opened as a pipe
        line = self._process.stdout.readline()
        if not line:
            sys.exit("llama.cpp ended: run `llama_worker.py` by hand to see why")
        return json.loads(line)


@dataclass(frozen=True)
class Figures:
    """Milliseconds `(10th, 50th, 90th percentile)` of one side."""

    decode: tuple[float, ...]
    prompt: tuple[float, ...]
    together: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return TOGETHER / self.together[1] * 1e3


def measure(sides: Mapping[str, Side], rounds: int) -> dict[str, Figures]:
    """Time each task on all sides in turns."""
    ranks = (10, 50, 90)
    tasks = {
        "decode": {name: (lambda side=side: side.decode(1)) for name, side in sides.items()},
        "prompt": {name: side.prompt for name, side in sides.items()},
        "together": {
            name: (lambda side=side: side.decode(TOGETHER)) for name, side in sides.items()
        },
    }
    took = {task: interleave(runs, range(rounds), warmup=2) for task, runs in tasks.items()}
    return {
        name: Figures(
            **{
                task: tuple(percentiles([one for turn in by[name] for one in turn], ranks))
                for task, by in took.items()
            }
        )
        for name in sides
    }


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[dict[str, Side]]:
    """All sides, by name."""
    engine = options.work / "engine" / "current"
    description = read_engine(engine)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        if description.dense_model is not None:
            sides["dense float"] = Ours(stack.enter_context(open_session(engine, side="dense")))
        if description.stored_model is not None:
            sides["dense in integers"] = Ours(
                stack.enter_context(open_session(engine, side="stored"))
            )
        sides["sparse"] = Ours(stack.enter_context(open_session(engine)))
        for form in options.format or ["Q8_0"]:
            rival = LlamaCpp(options.python, options.gguf, form, options.threads)
            stack.callback(rival.close)
            sides[f"llama.cpp {form}"] = rival
        yield sides


def table(figures: Mapping[str, Figures]) -> Iterator[str]:
    """The figures in Markdown."""
    yield f"| side | a token after {BEGINNING}, ms | a prompt of {BEGINNING}, ms | "
    yield f"{TOGETHER} sequences, tokens/s |\n|---|---:|---:|---:|\n"
    for name, one in figures.items():
        spread = [f"{mid:.2f} ({low:.2f} to {high:.2f})" for low, mid, high in (one.decode,)]
        spread += [f"{mid:.0f} ({low:.0f} to {high:.0f})" for low, mid, high in (one.prompt,)]
        yield f"| {name} | {spread[0]} | {spread[1]} | {one.tokens_per_second:.0f} |\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="a work directory with an engine")
    parser.add_argument("--gguf", type=Path, required=True, help="the file it was built from")
    parser.add_argument("--python", type=Path, required=True, help="one with llama-cpp-python")
    parser.add_argument("--format", action="append", help="of llama.cpp's side; may be repeated")
    parser.add_argument("--threads", type=int, default=probe().cores)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with opened(options) as sides:
        figures = measure(sides, options.rounds)
    sys.stdout.write(f"{probe().cpu}, {options.threads} threads\n\n")
    sys.stdout.writelines(table(figures))


if __name__ == "__main__":
    main()
