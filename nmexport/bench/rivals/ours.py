"""Our dense and our sparse engine as contestants, opened as `bench engines` opens them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nmexport.bench.rivals.interface import Contestant, Entry, Step
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.opening import open_session

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from nmexport.bench.rivals.interface import Case
    from nmexport.runtimes.engine import Side
    from nmexport.runtimes.session import Session


_NAMES: Mapping[Side, str] = {
    "dense": "ours, dense",
    "sparse": "ours, sparse",
    "stored": "ours, dense in integers",
}


def entries(engine: Path) -> tuple[Entry, ...]:
    """Describe all models of an engine.

    Args:
        engine: Folder with `engine.json`.

    Raises:
        ArtifactError: if `engine.json` cannot be read.
    """
    described = read_engine(engine)
    return tuple(entry(engine, side) for side in _NAMES if described.exported(side) is not None)


def entry(engine: Path, side: Side) -> Entry:
    """Describe one of our engines.

    Args:
        engine: Folder with `engine.json`.
        side: Which model.

    Raises:
        ArtifactError: if `engine.json` cannot be read.
    """
    model = read_engine(engine).exported(side)
    files = () if model is None else model.parent.glob("*.data")
    return Entry(
        name=_NAMES[side],
        is_rival=False,
        is_dense=side == "dense",
        weight_bytes=sum(file.stat().st_size for file in files),
        open=lambda: EngineContestant(open_session(engine, side=side, elsewhere=True)),
    )


class EngineContestant(Contestant):
    """One of our sessions, run on random tokens."""

    def __init__(self, session: Session, seed: int = 0) -> None:
        """Take over an open session."""
        self._session = session
        self._rng = np.random.default_rng(seed)

    @property
    def runtime(self) -> str:
        """Name and version of the session's runtime."""
        return self._session.runtime

    def prepare(self, case: Case) -> Step:
        """See `Contestant`."""
        shape = (case.batch, case.tokens)
        tokens = self._rng.integers(self._session.vocabulary_size, size=shape)
        step = _Prompt if case.phase == "prefill" else _Decode
        return step(self._session, tokens)

    def close(self) -> None:
        """Close the session."""
        self._session.close()


class _Prompt(Step):
    def __init__(self, session: Session, tokens: NDArray[np.int64]) -> None:
        self._session, self._tokens = session, tokens
        self.run()

    def run(self) -> None:
        self._session.next_tokens(None, self._tokens)


class _Decode(Step):
    def __init__(self, session: Session, tokens: NDArray[np.int64]) -> None:
        self._session = session
        chosen, cache = session.next_tokens(None, tokens)
        self._token = chosen[:, None].astype(np.int64)
        self._cache: Any = session.keep(cache)
        self.run()

    def run(self) -> None:
        self._session.next_tokens(self._session.resume(self._cache), self._token)

    def device_ms(self, times: int) -> float | None:
        if not self._session.on_gpu:
            return None
        cache = self._session.resume(self._cache)
        return self._session.queued_step_ms(cache, self._token, times)
