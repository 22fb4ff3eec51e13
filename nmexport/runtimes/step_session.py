"""A model on a CPU whose steps take tokens of many sequences, each with the bits it has alone.

It runs the graph that `graph.shared_step` makes: the tokens of all sequences lie one behind the
other, and attention sees each on its own pages of the cache. One sequence alone is a step of one:
a request that is served among others gets the bits of its solo run because it is the same
computation.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nmexport.environment import physical_cores
from nmexport.errors import ArtifactError
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.native import HUGE_PAGES_ENTRY, engine_library
from nmexport.runtimes.onnxruntime_opening import (
    EXTERNAL_DATA_FOLDER,
    RUNTIME,
    fits_huge_pages,
    open_inference_session,
    read_model,
    session_options,
)
from nmexport.runtimes.paged_cache import PAGE, PagedSequence, PagePool, beginning
from nmexport.runtimes.session import Limits, Session, Stepped, Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    import onnxruntime
    from nmexport.runtimes.engine import Side

_HOST = "cpu"


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedCache:
    """Caches of a batch of sequences; no later run changes it."""

    sequences: tuple[PagedSequence, ...]


class StepSession(Session):
    """A model with its cache in pages; implements `runtimes.session.Session`."""

    exposes_cache = True
    shares_steps = True
    runtime = RUNTIME
    cache: PagedCache | None = None

    def __init__(
        self,
        model: bytes,
        *,
        positions: int,
        library: Path,
        threads: int | None = None,
        config: Mapping[str, str],
    ) -> None:
        """Open a model as `graph.shared_step` rewrites it.

        Args:
            model: The serialised model.
            positions: Tokens of a sequence that it covers.
            library: The native op library.
            threads: Intra-op threads; None takes the physical cores this process may use.
            config: ONNX Runtime session configuration entries, with the weights' folder among them.

        Raises:
            EnvironmentFault: if the library is missing or does not load.
            ArtifactError: if the model cannot be opened.
        """
        self.threads = threads or physical_cores()
        options = session_options(library=library, threads=self.threads, config=config)
        self._session: onnxruntime.InferenceSession | None = open_inference_session(model, options)
        self._positions = positions
        inputs = self._session.get_inputs()
        self._has_position_ids = any(value.name == "position_ids" for value in inputs)
        caches = [value for value in inputs if value.name.startswith("past_key_values.")]
        self._past = tuple(value.name for value in caches)
        self._binding = self._session.io_binding()
        self._pool = PagePool([tuple(value.shape[1:]) for value in caches])
        self._bound: tuple[NDArray[np.float32], ...] = ()
        self._tensors = _StepTensors((), 0, last_only=True)
        outputs = {value.name: value for value in self._session.get_outputs()}
        self._vocabulary_size: int = outputs["logits"].shape[2]

    @classmethod
    def from_engine(cls, path: Path, *, side: Side = "sparse") -> Self:
        """Open one of the graphs for shared steps that `engine.json` names.

        Args:
            path: `engine.json`, or the folder that holds it.
            side: Which model.

        Raises:
            ArtifactError: see `read_engine`, `engine_library`.
            EnvironmentFault: if the native library is missing here.
        """
        engine = read_engine(path)
        step, library = engine.shared_step, engine_library(engine)
        model, weights = None if step is None else step.of(side), engine.exported(side)
        if step is None or model is None or weights is None or library is None:
            raise ArtifactError(
                f"{path} has no {side} graph for shared steps.",
                fix="run `nmexport engine --force`",
            )
        config = {
            HUGE_PAGES_ENTRY: "1" if fits_huge_pages(weights.parent) else "0",
            **engine.session_config,
            EXTERNAL_DATA_FOLDER: str(weights.parent),
        }
        return cls(
            read_model(model),
            positions=step.positions,
            library=library,
            threads=engine.threads,
            config=config,
        )

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    @property
    def limits(self) -> Limits:
        """The number of tokens that the rotary tables cover."""
        return Limits(tokens=self._positions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache, when its pages are full."""
        return self._pool.page_bytes // PAGE

    def cache_bytes(self, tokens: int) -> int:
        """See `Session`; whole pages."""
        return -(-tokens // PAGE) * self._pool.page_bytes

    def keep(self, cache: PagedCache) -> PagedCache:
        """See `Session`."""
        return cache

    def resume(self, cache: PagedCache) -> PagedCache:
        """See `Session`; pages of another session's pool are copied."""
        return PagedCache(sequences=tuple(map(self._pool.adopt, cache.sequences)))

    def beginning(self, cache: PagedCache, length: int) -> PagedCache:
        """See `Session`; the pages are shared."""
        return PagedCache(
            sequences=tuple(beginning(sequence, length) for sequence in cache.sequences)
        )

    def cache_values(self, cache: PagedCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """See `Session`."""
        length = max(sequence.length for sequence in cache.sequences)
        for index, name in enumerate(self._past):
            is_keys = name.endswith(".key")  # [page, H, D, PAGE]; values are [page, H, PAGE, D]
            rows = [_values(row, index, length, is_keys=is_keys) for row in cache.sequences]
            yield name.replace("past_key_values.", "present.", 1), np.stack(rows)

    def extend(
        self,
        cache: PagedCache | None,
        input_ids: NDArray[np.int64],
        new_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], PagedCache]:
        """See `Session`.

        Args:
            cache: The cache, or None.
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            new_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens. Padding is not
                computed, and its logits are 0.
        """
        mask = np.ones(input_ids.shape, bool) if new_mask is None else new_mask != 0
        rows = [ids[kept] for ids, kept in zip(input_ids, mask, strict=True)]
        logits, extended = self._run(_sequences(cache, rows), rows, last_only=False)
        spread = np.zeros((*input_ids.shape, self._vocabulary_size), np.float32)
        spread[mask] = logits
        return spread, PagedCache(sequences=extended)

    def extend_last(
        self, cache: PagedCache | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], PagedCache]:
        """See `Session`; the other tokens' logits are not computed."""
        rows = list(input_ids)
        logits, extended = self._run(_sequences(cache, rows), rows, last_only=True)
        return logits[:, None], PagedCache(sequences=extended)

    def step(self, work: Sequence[Work]) -> list[Stepped]:
        """See `Session`; all in one run."""
        befores = [None if item.cache is None else item.cache.sequences[0] for item in work]
        rows = [np.asarray(item.tokens, np.int64) for item in work]
        logits, extended = self._run(befores, rows, last_only=True)
        return [
            Stepped(row, PagedCache(sequences=(sequence,)), int(row.argmax()))
            for row, sequence in zip(logits, extended, strict=True)
        ]

    def close(self) -> None:
        """Free the model and its cache."""
        self.cache = None
        self._binding = None
        self._session = None

    def _run(
        self,
        befores: Sequence[PagedSequence | None],
        rows: Sequence[NDArray[np.int64]],
        *,
        last_only: bool,
    ) -> tuple[NDArray[np.float32], tuple[PagedSequence, ...]]:
        """Run each row's tokens behind its sequence; logits `[L, V]` of all or the last tokens.

        Raises:
            ArtifactError: if a sequence grows beyond the model's tables.
        """
        if self._session is None:
            raise RuntimeError("the session is closed")
        counts = [len(row) for row in rows]
        self._check_lengths(befores, counts)
        after = tuple(
            self._pool.extend(before, count) if count else before or self._pool.extend(None, 0)
            for before, count in zip(befores, counts, strict=True)
        )
        logits = self._bind(after, rows, last_only=last_only)
        self._session.run_with_iobinding(self._binding)
        return logits[0], after

    def _check_lengths(
        self, befores: Sequence[PagedSequence | None], counts: Sequence[int]
    ) -> None:
        longest = max(
            (before.length if before else 0) + count
            for before, count in zip(befores, counts, strict=True)
        )
        if longest > self._positions:
            raise ArtifactError(
                f"{longest} tokens are more than this engine covers.",
                allowed=f"up to {self._positions} tokens, prompt and answer together",
            )

    def _bind(
        self,
        after: Sequence[PagedSequence],
        rows: Sequence[NDArray[np.int64]],
        *,
        last_only: bool,
    ) -> NDArray[np.float32]:
        """Bind what one run reads and its logits, which are returned, where they have moved."""
        counts = tuple(map(len, rows))
        pages = max(len(sequence.pages) for sequence in after)
        tensors = self._tensors
        if (counts, pages, last_only) != (tensors.counts, tensors.pages, tensors.last_only):
            tensors = _StepTensors(counts, pages, last_only=last_only)
            for name, array in tensors.by_name(with_ids=self._has_position_ids):
                self._binding.bind_cpu_input(name, array)
            self._tensors = tensors
        tensors.fill(after, rows)
        if tensors.logits is None or sys.getrefcount(tensors.logits) > _OWN_REFERENCES:
            shape = (1, tensors.logit_count, self._vocabulary_size)
            tensors.logits = np.empty(shape, np.float32)
            place = (_HOST, 0, np.float32, shape, tensors.logits.ctypes.data)
            self._binding.bind_output("logits", *place)
        if self._bound is not self._pool.arrays:
            self._bound = self._pool.arrays
            for name, array in zip(self._past, self._bound, strict=True):
                place = (_HOST, 0, np.float32, array.shape, array.ctypes.data)
                self._binding.bind_input(name, *place)
                self._binding.bind_output(name.replace("past_key_values.", "present.", 1), *place)
        return tensors.logits


_OWN_REFERENCES = 2
"""References to an array that nobody else holds: the tensors', and the argument of the question."""


class _StepTensors:
    """Tensors beside the cache that runs of one shape read and write: bound once, then filled.

    A token of an answer has the shape of the one before it, and binding takes longer than writing.
    """

    def __init__(self, counts: tuple[int, ...], pages: int, *, last_only: bool) -> None:
        """Make room for the tokens of some sequences, with so many pages each at most."""
        self.counts = counts
        self.pages = pages
        self.last_only = last_only
        self.logits: NDArray[np.float32] | None = None
        """Of the last run; made again where somebody still holds them."""
        ends = np.cumsum(counts, dtype=np.int64)
        tokens = sum(counts)
        self._logits_at = ends - 1 if last_only else np.arange(tokens)
        self._sequences = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._ids = np.zeros((1, tokens), np.int64)
        self._positions = np.zeros(tokens, np.int32)
        self._position_ids = np.zeros((1, tokens), np.int64)
        self._pages = np.zeros((len(counts), pages), np.int32)
        self._held: list[list[int]] = [[] for _ in counts]

    @property
    def logit_count(self) -> int:
        """Tokens that get logits."""
        return len(self._logits_at)

    def by_name(self, *, with_ids: bool) -> Iterator[tuple[str, NDArray[Any]]]:
        """The tensors that are read, under the names of the model's inputs."""
        yield "input_ids", self._ids
        yield "sequences", self._sequences
        yield "positions", self._positions
        yield "pages", self._pages
        yield "logits_at", self._logits_at
        if with_ids:
            yield "position_ids", self._position_ids

    def fill(self, after: Sequence[PagedSequence], rows: Sequence[NDArray[np.int64]]) -> None:
        """Write one run's values; tables of shorter sequences end in zeros."""
        begin = 0
        for index, (sequence, row) in enumerate(zip(after, rows, strict=True)):
            count, length = len(row), sequence.length
            self._ids[0, begin : begin + count] = row
            if count == 1:
                self._positions[begin] = length - 1
            else:
                self._positions[begin : begin + count] = np.arange(length - count, length)
            held = sequence.indices
            if held != self._held[index]:
                self._held[index] = held
                self._pages[index, : len(held)] = held
                self._pages[index, len(held) :] = 0
            begin += count
        self._position_ids[0] = self._positions


def _sequences(
    cache: PagedCache | None, rows: Sequence[NDArray[np.int64]]
) -> Sequence[PagedSequence | None]:
    return [None] * len(rows) if cache is None else cache.sequences


def _values(
    sequence: PagedSequence, index: int, length: int, *, is_keys: bool
) -> NDArray[np.float32]:
    """One sequence's part of an array of the cache as `[H, length, D]`, padded on the left."""
    pages = sequence.pool.arrays[index][sequence.indices]
    by_place = pages.transpose(1, 0, 3, 2) if is_keys else pages.transpose(1, 0, 2, 3)
    joined = by_place.reshape(by_place.shape[0], -1, by_place.shape[3])[:, : sequence.length]
    return np.pad(joined, ((0, 0), (length - sequence.length, 0), (0, 0)))
