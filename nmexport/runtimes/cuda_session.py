"""A model on ONNX Runtime's CUDA provider, with its cache written in place and steps as graphs.

It runs the graph that `graph.cuda` makes. A cache is a set of buffers on the device with room for
`capacity` tokens, which every run binds as input and as output. A decode step on it has the same
addresses each time, so the runtime records it as a CUDA graph and replays it:

    token ids ──► one graph launch ──► next token ids
              ▲ positions, uploaded

Token ids lie in memory of the host that the device reads and writes. Positions are read once a
layer, before that layer waits for what is ahead of it: they are copied to the device beforehand.
Logits stay on the device, and are copied to the host where somebody asks for them.

Buffers are kept when a sequence ends (see `device_cache`), with the graph that was recorded on
them: as many graphs exist as sequences have ever run at a time.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nmexport.runtimes.cuda_model import (
    CHOSEN,
    LOGITS,
    NO_GRAPH,
    CudaModel,
    open_engine_graph,
)
from nmexport.runtimes.device_cache import (
    Buffers,
    DeviceCache,
    DeviceCaches,
    Lease,
)
from nmexport.runtimes.onnxruntime_opening import RUNTIME
from nmexport.runtimes.session import Limits, Session
from nmexport.timing import milliseconds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Side

_RECORDING_RUNS = 2
"""Runs of a step after which it is recorded: one as any other, one that the recorder watches."""


@dataclass(frozen=True)
class _Room:
    """The place of the next tokens."""

    lease: Lease
    lengths: NDArray[np.int32]
    """Tokens of each sequence, the new ones included, `[B]`."""

    def extended_cache(self) -> DeviceCache:
        """Return the cache with the new tokens in it; the last that was written."""
        cache = DeviceCache(lease=self.lease, lengths=self.lengths)
        self.lease.tip = weakref.ref(cache)
        return cache


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A decode step on one set of buffers: everything it reads and writes, bound once."""

    binding: Any
    options: Any
    queueing: Any
    """Options of a run that returns while the device still computes."""
    ids: NDArray[np.int64]
    """`[B, 1]`, in memory of the host that the device reads."""
    chosen: NDArray[np.int64]
    """`[B, 1]`: the likeliest next token, in memory of the host that the device writes."""
    last: Any
    """`[B]` int32: position of the new token."""
    places: Any
    """`[1]`: new tokens whose logits are wanted."""
    logits: Any
    """`[B, 1, V]`, on the device."""


class CudaSession(Session):
    """A model with its KV cache in place; implements `runtimes.session.Session`."""

    exposes_cache = True
    runtime = RUNTIME

    def __init__(self, model: CudaModel) -> None:
        """Take over an open model."""
        self._model = model
        self.on_gpu = model.device == "cuda"
        self._caches = DeviceCaches(
            model.cache_tensors, positions=model.positions, device=model.device
        )
        self._steps: weakref.WeakKeyDictionary[Buffers, _Step] = weakref.WeakKeyDictionary()
        self._graphs = 0

    @classmethod
    def from_engine(cls, path: Path, *, side: Side = "sparse") -> Self:
        """Open the graphs for CUDA that `engine.json` names.

        Args:
            path: `engine.json`, or the folder that holds it.
            side: Which model.

        Raises:
            ArtifactError: see `open_engine_graph`.
            EnvironmentFault: see the same.
        """
        return cls(open_engine_graph(path, side=side))

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._model.vocabulary_size

    @property
    def limits(self) -> Limits:
        """The number of tokens that the rotary tables cover."""
        return Limits(tokens=self._model.positions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache."""
        return self._model.bytes_per_token

    def keep(self, cache: DeviceCache) -> DeviceCache:
        """See `Session`; full buffers are copied now, not again in each run that continues them."""
        return self._caches.keep(cache)

    def cache_values(self, cache: DeviceCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """See `Session`."""
        return self._caches.values(cache)

    def extend(
        self,
        cache: DeviceCache | None,
        input_ids: NDArray[np.int64],
        new_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """See `Session`.

        Args:
            cache: The cache, or None.
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            new_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens.
        """
        if new_mask is None or new_mask.all():
            return self._run(cache, input_ids, np.full(len(input_ids), input_ids.shape[1]))
        # The runtime pads on the right.
        length = input_ids.shape[1]
        counts = new_mask.sum(axis=1)
        rows = np.stack(
            [np.roll(row, count - length) for row, count in zip(input_ids, counts, strict=True)]
        )
        logits, extended = self._run(cache, rows, counts)
        turned = [
            np.roll(row, length - count, 0) for row, count in zip(logits, counts, strict=True)
        ]
        return np.stack(turned), extended

    def extend_last(
        self, cache: DeviceCache | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """See `Session`; the other tokens' logits are not computed."""
        counts = np.full(len(input_ids), input_ids.shape[1])
        return self._run(cache, input_ids, counts, last_only=True)

    def next_tokens(
        self, cache: DeviceCache | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], DeviceCache]:
        """See `Session`; the device chooses."""
        room = self._room(cache, input_ids, np.full(len(input_ids), input_ids.shape[1]))
        if input_ids.shape[1] == 1:
            chosen = self._decode(room, input_ids).chosen.copy()  # the next step overwrites it
        else:
            chosen = self._prompt(room, input_ids, CHOSEN, last_only=True)
        return chosen[:, -1], room.extended_cache()

    def queued_step_ms(
        self, cache: DeviceCache, input_ids: NDArray[np.int64], times: int
    ) -> float | None:
        """See `Session`; a recorded step needs nothing from the host but its launch."""
        step = self._record(cache, input_ids)

        def run() -> None:
            for _ in range(times - 1):
                self._model.session.run_with_iobinding(step.binding, step.queueing)
            # Waits for itself and for all before it in the stream.
            self._model.session.run_with_iobinding(step.binding, step.options)

        return milliseconds(run) / times

    def _record(self, cache: DeviceCache, input_ids: NDArray[np.int64]) -> _Step:
        """Record a step on a cache, its inputs in place, for the runtime to replay."""
        for _ in range(_RECORDING_RUNS):
            buffers = self.next_tokens(cache, input_ids)[1].lease.buffers
        return self._steps[buffers]

    def close(self) -> None:
        """Free the model and its caches."""
        self.cache = None
        self._caches.clear()
        self._steps.clear()
        self._model.close()

    def _run(
        self,
        cache: DeviceCache | None,
        ids: NDArray[np.int64],
        counts: NDArray[Any],
        *,
        last_only: bool = False,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """Run the first `counts` of each row's tokens after those in the cache."""
        room = self._room(cache, ids, counts)
        if ids.shape[1] == 1:
            logits = self._model.read_logits(self._decode(room, ids).logits)
        else:
            logits = self._model.to_float32(self._prompt(room, ids, LOGITS, last_only=last_only))
        return logits, room.extended_cache()

    def _room(
        self, cache: DeviceCache | None, ids: NDArray[np.int64], counts: NDArray[Any]
    ) -> _Room:
        """Provide buffers for the first `counts` tokens of each row, behind the cache."""
        before = 0 if cache is None else cache.lengths
        # A padded row's garbage needs room too.
        needed = int((before + np.full_like(counts, ids.shape[1])).max())
        lease = self._caches.lease_for(cache, len(ids), needed)
        return _Room(lease, (before + counts).astype(np.int32))

    def _decode(self, room: _Room, ids: NDArray[np.int64]) -> _Step:
        buffers = room.lease.buffers
        step = self._steps.get(buffers)
        if step is None:
            step = self._steps[buffers] = self._bind_step(buffers)
        step.ids[...] = ids
        step.last.update_inplace(room.lengths - 1)
        self._model.session.run_with_iobinding(step.binding, step.options)
        return step

    def _bind_step(self, buffers: Buffers) -> _Step:
        """Bind a decode step to buffers permanently; the runtime records it in its first runs."""
        model, batch = self._model, buffers.batch
        self._graphs += 1
        step = _Step(
            binding=model.session.io_binding(),
            options=model.options(str(self._graphs)),
            queueing=model.options(str(self._graphs), waits=False),
            ids=model.visible(batch, 1),
            last=model.on_device(np.zeros(batch, np.int32)),
            chosen=model.visible(batch, 1),
            places=model.on_device(np.zeros(1, np.int64)),
            logits=model.on_device(np.zeros((batch, 1, model.vocabulary_size), model.logits_dtype)),
        )
        # The graph is replayed at every length up to the capacity, so that is the bound it gets.
        self._bind(step.binding, buffers, buffers.capacity)
        step.binding.bind_input("input_ids", *model.place(step.ids))
        step.binding.bind_ortvalue_input("last_positions", step.last)
        step.binding.bind_ortvalue_input("logits_at", step.places)
        step.binding.bind_output(CHOSEN, *model.place(step.chosen))
        model.bind_logits(step.binding, step.logits)
        return step

    def _prompt(
        self, room: _Room, ids: NDArray[np.int64], output: str, *, last_only: bool
    ) -> NDArray[Any]:
        """Run more than one token, and return an output for each of them, or for the last."""
        length, model = ids.shape[1], self._model
        binding = model.session.io_binding()
        self._bind(binding, room.lease.buffers, int(room.lengths.max()))
        places = np.arange(length - 1 if last_only else 0, length, dtype=np.int64)
        given = {"input_ids": ids, "last_positions": room.lengths - 1, "logits_at": places}
        for name, array in given.items():
            binding.bind_ortvalue_input(name, model.on_device(np.ascontiguousarray(array)))
        values = model.bind_host_output(binding, output, (len(ids), len(places)))
        model.session.run_with_iobinding(binding, model.options(NO_GRAPH))
        return values

    def _bind(self, binding: Any, buffers: Buffers, bound: int) -> None:
        """Bind the caches; `bound` is no less than the longest sequence."""
        self._model.bind_bound(binding, bound)
        places = ((value.shape(), value.data_ptr()) for value in buffers.values)
        self._model.bind_caches(binding, places)
