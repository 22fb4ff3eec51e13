"""A model on a GPU that serves many sequences, each with the bits that it has alone.

The bits of a product on a GPU depend on how many rows it has, and not on what the other rows hold.
So a decode step here always has the same number of rows: one for each slot, whether a sequence is
in it or not. A sequence alone runs the same step as one among others.

    slot 0: sequence A ──┐
    slot 1: nobody     ──┼──► one CUDA graph of S rows ──► next token of each slot
    slot 2: sequence B ──┘    caches [S, H, capacity, D], written in place

Prompts run one by one, each on its own slot's part of the caches. They are cut at multiples of a
fixed number of tokens, counted from the prompt's beginning: the cut decides the bits as well, and
so it depends on the prompt alone. What a longer sequence left in a slot lies behind the end of the
next one, where nothing reads it.

The device does not wait for the host between steps: where every sequence goes on with its likeliest
token, the next step is started before the results of the last one are handed out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from nmexport.errors import ArtifactError
from nmexport.runtimes.chunks import chunk_end
from nmexport.runtimes.cuda_model import CudaModel, open_engine_graph
from nmexport.runtimes.onnxruntime_opening import RUNTIME
from nmexport.runtimes.session import Limits, Session, Stepped, Work
from nmexport.runtimes.slot_runs import PromptRuns, SlotBuffers, StepRuns
from nmexport.runtimes.slots import Slots, slots_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Side
    from nmexport.runtimes.slots import SlotLease, SlotRoom


class _Held(NamedTuple):
    """The first tokens of a sequence in a slot."""

    lease: SlotLease
    length: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotCache:
    """Sequences of a batch, each in a slot; a run that goes on from it writes behind it."""

    sequences: tuple[_Held, ...]


class _Part(NamedTuple):
    """One sequence's part of a step."""

    held: _Held
    work: Work

    @property
    def slot(self) -> int:
        return self.held.lease.index

    @property
    def length(self) -> int:
        """Tokens of the sequence after the step."""
        return self.held.length + len(self.work.tokens)

    @property
    def after(self) -> _Held:
        """The sequence after the step."""
        return _Held(self.held.lease, self.length)

    @property
    def is_decoding(self) -> bool:
        return len(self.work.tokens) == 1


class SlotSession(Session):
    """A model with a fixed number of slots for sequences."""

    shares_steps = True
    runtime = RUNTIME

    def __init__(self, model: CudaModel, *, slots: int, tokens: int, chunk: int) -> None:
        """Make room for the slots, and record the step.

        Args:
            model: Taken over.
            slots: Sequences at a time, which are the rows of every decode step.
            tokens: Tokens that each of them may have.
            chunk: Where prompts are cut.
        """
        self._model = model
        self.on_gpu = model.device == "cuda"
        self.chunk = self._chunk = chunk
        self._tokens = min(tokens, model.positions)
        self._slots = Slots(slots)
        # Runs know addresses alone.
        self._buffers = SlotBuffers(model, slots=slots, tokens=self._tokens)
        self._steps = StepRuns(model, self._buffers, self._slots, most=self._tokens - 1)
        self._prompts = PromptRuns(model, self._buffers, chunk=chunk)
        self._steps.record()

    @classmethod
    def from_engine(cls, path: Path, room: SlotRoom, *, side: Side = "sparse") -> Self:
        """Open one of the graphs for CUDA that `engine.json` names.

        Args:
            path: `engine.json`, or the folder that holds it.
            room: Slots that are wanted.
            side: Which model.

        Raises:
            ArtifactError: see `open_engine_graph`.
            EnvironmentFault: see the same.
            RequestError: if the slots do not fit into the device's memory.
        """
        model = open_engine_graph(path, side=side)
        tokens = slots_for(room, model)
        return cls(model, slots=room.slots, tokens=tokens, chunk=room.chunk)

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._model.vocabulary_size

    @property
    def limits(self) -> Limits:
        """As many sequences as there are slots, and as many tokens as each has room for."""
        return Limits(batch=self._slots.count, tokens=self._tokens)

    def cache_bytes(self, tokens: int) -> int:
        """See `Session`; a slot, however many tokens there are in it."""
        del tokens
        return self._tokens * self._model.bytes_per_token

    def step(self, work: Sequence[Work]) -> list[Stepped]:
        """See `Session`; one run for those with one token, and one for each prompt."""
        parts = [self._part(item) for item in work]
        self._steps.start(
            {
                part.slot: (int(part.work.tokens[0]), part.held.length)
                for part in parts
                if part.is_decoding
            }
        )
        for part in parts:
            if not part.is_decoding:
                self._start_prompt(part)
        self._model.wait()
        return self._results(parts)

    def extend(
        self, cache: SlotCache | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], SlotCache]:
        """See `Session`; rows of a prompt run one by one."""
        if input_ids.shape[1] == 1:
            return self.extend_last(cache, input_ids)
        rows = []
        held = []
        for part in self._parts(cache, input_ids):
            self._steps.finish()
            tokens = part.work.tokens
            pieces = [
                self._prompts.all_logits(part.slot, tokens[begin:end], part.held.length + begin)
                for begin, end in self._cuts(len(tokens))
            ]
            rows.append(np.concatenate(pieces))
            held.append(part.after)
            self._slots.ends[part.slot] = part.length
        return np.stack(rows), SlotCache(sequences=tuple(held))

    def extend_last(
        self, cache: SlotCache | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], SlotCache]:
        """See `Session`; what `step` gives."""
        results = self.step([part.work for part in self._parts(cache, input_ids)])
        logits = [result.logits for result in results if result.logits is not None]
        return np.stack(logits)[:, None], _join(results)

    def next_tokens(
        self, cache: SlotCache | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], SlotCache]:
        """See `Session`; the device chooses."""
        parts = self._parts(cache, input_ids)
        results = self.step([part.work._replace(needs_logits=False) for part in parts])
        return np.array([result.token for result in results], np.int64), _join(results)

    def close(self) -> None:
        """Free the model and its slots."""
        self.cache = None
        self._steps.finish()
        self._steps.close()
        self._prompts.close()
        self._model.close()

    def _parts(self, cache: SlotCache | None, input_ids: NDArray[np.int64]) -> list[_Part]:
        caches: Sequence[SlotCache | None] = [None] * len(input_ids)
        if cache is not None:
            caches = [SlotCache(sequences=(held,)) for held in cache.sequences]
        return [self._part(Work(cache, row)) for cache, row in zip(caches, input_ids, strict=True)]

    def _part(self, work: Work) -> _Part:
        """A sequence's part of a step; a new sequence takes a slot.

        Raises:
            ArtifactError: if the sequence grows beyond its slot, or there is no slot.
        """
        held = _Held(self._slots.take(), 0) if work.cache is None else work.cache.sequences[0]
        part = _Part(held, work)
        if part.length > self._tokens:
            raise ArtifactError(
                f"{part.length} tokens are more than a slot has room for.",
                allowed=f"up to {self._tokens} tokens, prompt and answer together",
            )
        # The work holds the slot from now on: whoever drops it frees the slot.
        return _Part(held, work._replace(cache=SlotCache(sequences=(held,))))

    def _start_prompt(self, part: _Part) -> None:
        cuts = self._cuts(len(part.work.tokens))
        for index, (begin, end) in enumerate(cuts):
            if index:  # what the device reads of the chunk before is about to be overwritten
                self._model.wait()
            tokens = part.work.tokens[begin:end]
            self._prompts.start(part.slot, tokens, part.held.length + begin)

    def _cuts(self, total: int) -> list[tuple[int, int]]:
        cuts = []
        begin = 0
        while begin < total:
            end = chunk_end(begin, total, self._chunk)
            cuts.append((begin, end))
            begin = end
        return cuts

    def _results(self, parts: Sequence[_Part]) -> list[Stepped]:
        """Read what the runs left, and start the next step as soon as that is done."""
        chosen = self._steps.chosen()
        tokens = [
            int(chosen[part.slot]) if part.is_decoding else self._prompts.chosen(part.slot)
            for part in parts
        ]
        logits = self._logits(parts)
        for part in parts:
            self._slots.ends[part.slot] = part.length
        self._look_ahead(parts, tokens)
        caches = (SlotCache(sequences=(part.after,)) for part in parts)
        return list(map(Stepped, logits, caches, tokens))

    def _logits(self, parts: Sequence[_Part]) -> list[NDArray[np.float32] | None]:
        """Logits of each part's last token, where they are needed."""
        wanted: list[NDArray[np.float32] | None] = [None] * len(parts)
        rows = None
        for index, part in enumerate(parts):
            if not part.work.needs_logits:
                continue
            if not part.is_decoding:
                wanted[index] = self._prompts.logits(part.slot)
                continue
            if rows is None:  # all of them come in one copy
                rows = self._steps.logits()
            wanted[index] = rows[part.slot]
        return wanted

    def _look_ahead(self, parts: Sequence[_Part], tokens: Sequence[int]) -> None:
        """Start the next step where its tokens are known: nobody draws one from logits."""
        if any(part.work.needs_logits and not part.work.goes_on for part in parts):
            return
        rows = {
            part.slot: (token, part.length)
            for part, token in zip(parts, tokens, strict=True)
            if part.work.goes_on and part.length < self._tokens
        }
        if rows:
            self._steps.start_ahead(rows)


def _join(results: Sequence[Stepped]) -> SlotCache:
    return SlotCache(sequences=tuple(result.cache.sequences[0] for result in results))
