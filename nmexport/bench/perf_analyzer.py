"""Triton's perf_analyzer as a load: `pip install --no-deps --target DIR tritonclient==2.51.0`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nmexport.errors import EnvironmentFault

if TYPE_CHECKING:
    from nmexport.bench.soak import Soak
    from nmexport.serving.launch import Installation

# Libraries that it wants by these names; the wheel of the server has them under others.
_BORROWED = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_STOP_SECONDS = 60.0
_PROMPTS = 8
_LAST_WORDS = 2000


class PerfAnalyzer:
    """Streams over gRPC from a process of its own, until it is stopped."""

    def __init__(self, program: Path, installation: Installation) -> None:
        """Prepare to run a program.

        Args:
            program: perf_analyzer.
            installation: A server; one of the wheel lends its libraries.

        Raises:
            EnvironmentFault: if there is no such program.
        """
        if not program.is_file():
            raise EnvironmentFault(
                f"There is no perf_analyzer {program}.",
                fix="pip install --no-deps --target DIR tritonclient==2.51.0, "
                "then name DIR/bin/perf_analyzer",
            )
        self._program = program
        self._lenders = installation.libraries
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, address: str, model: str, load: Soak) -> None:
        """Start to send requests to a gRPC address."""
        scratch = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="nmexport-")))
        asks = [ask for ask, _ in zip(load.asks(), range(_PROMPTS), strict=False)]
        rows = [
            {
                "text_input": [ask.fields["text_input"]],
                "max_tokens": [ask.fields["max_tokens"]],
                "stream": [True],
            }
            for ask in asks
        ]
        (scratch / "input.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
        self._log = self._cleanup.enter_context((scratch / "log").open("w+b"))
        # It asks until two windows agree: by this measure they never do.
        never_done = ["--stability-percentage=0.0001", "--max-trials=100000"]
        self._process = subprocess.Popen(  # noqa: S603  the program that was named
            [
                str(self._program.resolve()),
                *("-m", model, "-u", address, "-i", "grpc", "--streaming", "--async"),
                f"--input-data={scratch / 'input.json'}",
                f"--concurrency-range={load.clients}",
                *never_done,
            ],
            env={**os.environ, "LD_LIBRARY_PATH": str(self._libraries(scratch))},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def _libraries(self, scratch: Path) -> Path:
        folder = scratch / "libraries"
        folder.mkdir()
        for name, pattern in _BORROWED.items():
            for found in self._lenders.glob(pattern) if self._lenders else ():
                (folder / name).symlink_to(found)
        return folder

    def check(self) -> None:
        """Raise if it ended.

        Raises:
            EnvironmentFault: with what it said last.
        """
        if self._process is None or self._process.poll() is None:
            return
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-_LAST_WORDS:]
        raise EnvironmentFault(f"perf_analyzer ended with {self._process.returncode}:\n{said}")

    def stop(self) -> None:
        """Let its requests end, then stop it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._cleanup.close()
