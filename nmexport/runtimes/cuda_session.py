"""A model on ONNX Runtime's CUDA provider, with its cache written in place and steps as graphs.

It runs the graph that `graph.cuda` makes. A cache is a set of buffers on the device with room for
`capacity` tokens, which every run binds as input and as output. A decode step on it has the same
addresses each time, so the runtime records it as a CUDA graph and replays it:

    token ids, positions ──upload──► device ──one graph launch──► logits ──download──► host

Buffers are kept when a sequence ends, with the graph that was recorded on them, and given to the
next one: as many graphs exist as sequences have ever run at a time.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

import onnxruntime
from nmexport.errors import ArtifactError
from nmexport.runtimes.engine import read_engine
from nmexport.runtimes.feeds import float32_from
from nmexport.runtimes.native import engine_library
from nmexport.runtimes.onnxruntime_session import (
    EXTERNAL_DATA_FOLDER,
    NUMPY_TYPES,
    ONNX_TYPES,
    RUNTIME,
    open_session,
    session_options,
)
from nmexport.runtimes.session import Limits, Session
from nmexport.timing import milliseconds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_BUCKET = 512
"""Capacities are this times a power of two: few shapes, few graphs, and growth is rare."""
_HEADROOM = 128
"""Tokens that new buffers have room for beyond what is put into them: a prompt whose length is a
capacity would grow at its first answer token."""
_NO_GRAPH = "-1"
_RECORDING_RUNS = 2
"""Runs of a step after which it is recorded: one as any other, one that the recorder watches."""

Device = Literal["cuda", "cpu"]


@dataclass(eq=False)
class _Buffers:
    """Device memory of one batch of sequences."""

    batch: int
    capacity: int
    """Tokens of a sequence."""
    values: tuple[Any, ...]
    """One OrtValue `[B, H, capacity, D]` for each past input."""


@dataclass(eq=False)
class _Lease:
    """Holds buffers until the last cache that uses them is dropped."""

    buffers: _Buffers
    tip: weakref.ref[DeviceCache] | None = None
    """The cache that was written last; None once nobody holds it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceCache:
    """The first `lengths` tokens in some buffers; runs that go on from it write behind."""

    lease: _Lease
    lengths: NDArray[np.int32]
    """Tokens of each sequence `[B]`."""


@dataclass(frozen=True)
class _Fed:
    """Inputs of a run other than caches, on the device."""

    ids: Any
    """`[B, S]`."""
    last: Any
    """`[B]`: position of the last new token."""
    places: Any
    """`[L]`: new tokens whose logits are wanted."""


@dataclass(frozen=True)
class _Step:
    """A decode step on one set of buffers: everything it reads and writes, bound once."""

    binding: Any
    options: Any
    queueing: Any
    """Options of a run that returns while the device still computes."""
    fed: _Fed
    logits: Any
    """`[B, 1, V]`."""


@dataclass(frozen=True, kw_only=True)
class _Slot:
    """One past input, and the present output that is bound to the same memory."""

    past: str
    present: str
    heads: int
    head_dim: int
    type: str


@dataclass
class _Pool:
    """Buffers that no cache uses, by batch and capacity."""

    free: dict[tuple[int, int], list[_Buffers]] = field(default_factory=dict)

    def put(self, buffers: _Buffers) -> None:
        self.free.setdefault((buffers.batch, buffers.capacity), []).append(buffers)

    def take(self, batch: int, capacity: int) -> _Buffers | None:
        waiting = self.free.get((batch, capacity))
        return waiting.pop() if waiting else None


class CudaSession(Session):
    """A model with its KV cache in place; implements `runtimes.session.Session`."""

    exposes_cache = True
    runtime = RUNTIME

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        positions: int,
        device: Device = "cuda",
    ) -> None:
        """Take over an open session.

        Args:
            session: A model as `graph.cuda` rewrites it, opened with CUDA graphs enabled where the
                device is `cuda`.
            positions: Tokens of a sequence that its rotary tables cover.
            device: `cpu` computes the same without a GPU, for tests.
        """
        self._session: onnxruntime.InferenceSession | None = session
        self._device = device
        self.on_gpu = device == "cuda"
        self._positions = positions
        self._slots = _slots_of(session)
        logits = {value.name: value for value in session.get_outputs()}["logits"]
        self._logits_type: str = logits.type
        self._vocabulary_size: int = logits.shape[2]
        self._pool = _Pool()
        self._steps: weakref.WeakKeyDictionary[_Buffers, _Step] = weakref.WeakKeyDictionary()
        self._graphs = 0

    @classmethod
    def from_engine(cls, path: Path, *, dense: bool = False) -> Self:
        """Open the graphs for CUDA that `engine.json` names.

        Args:
            path: `engine.json`, or the folder that holds it.
            dense: Open the dense baseline in place of the sparse model.

        Raises:
            ArtifactError: see `read_engine`, `engine_library`.
            EnvironmentFault: if the native library is missing here, or CUDA does not work.
        """
        engine = read_engine(path)
        cuda = engine.cuda
        model = None if cuda is None else cuda.dense_model if dense else cuda.model
        weights = engine.dense_model if dense else engine.model
        if cuda is None or model is None or weights is None:
            raise ArtifactError(
                f"{path} has no {'dense' if dense else 'sparse'} graph for CUDA.",
                fix="run `nmexport engine --force`",
            )
        options = session_options(
            library=engine_library(engine),
            threads=engine.threads,
            config={**engine.session_config, EXTERNAL_DATA_FOLDER: str(weights.parent)},
        )
        session = open_session(model.read_bytes(), options, "cuda", records_graphs=True)
        return cls(session, positions=cuda.positions)

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    @property
    def limits(self) -> Limits:
        """As many tokens as the rotary tables cover."""
        return Limits(tokens=self._positions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache."""
        return sum(
            slot.heads * slot.head_dim * NUMPY_TYPES[slot.type].itemsize for slot in self._slots
        )

    def keep(self, cache: DeviceCache) -> DeviceCache:
        """See `Session`; what is full is moved now, and not by each run that goes on from it."""
        length = int(cache.lengths.max())
        if length < min(cache.lease.buffers.capacity, self._positions):
            return cache
        return DeviceCache(
            lease=self._copy_of(cache.lease.buffers, length + 1), lengths=cache.lengths
        )

    def cache_values(self, cache: DeviceCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """See `Session`."""
        length = int(cache.lengths.max())
        for slot, value in zip(self._slots, cache.lease.buffers.values, strict=True):
            elements = value.numpy()[:, :, :length]
            yield slot.present, float32_from(elements, is_bfloat16=_is_bfloat16(slot.type))

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

    def queued_step_ms(
        self, cache: DeviceCache, input_ids: NDArray[np.int64], times: int
    ) -> float | None:
        """See `Session`; a recorded step needs nothing from the host but its launch."""
        step = self._recorded(cache, input_ids)

        def run() -> None:
            for _ in range(times - 1):
                self._open.run_with_iobinding(step.binding, step.queueing)
            # Waits for itself and for all before it in the stream.
            self._open.run_with_iobinding(step.binding, step.options)

        return milliseconds(run) / times

    def _recorded(self, cache: DeviceCache, input_ids: NDArray[np.int64]) -> _Step:
        """A step on a cache, its inputs in place, that the runtime replays from now on."""
        for _ in range(_RECORDING_RUNS):
            buffers = self.extend_last(cache, input_ids)[1].lease.buffers
        return self._steps[buffers]

    def close(self) -> None:
        """Free the model and its caches."""
        self.cache = None
        self._pool.free.clear()
        self._steps.clear()
        self._session = None

    def _run(
        self,
        cache: DeviceCache | None,
        ids: NDArray[np.int64],
        counts: NDArray[Any],
        *,
        last_only: bool = False,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """Run the first `counts` of each row's tokens after those in the cache."""
        before = 0 if cache is None else cache.lengths
        lengths = (before + counts).astype(np.int32)
        # A padded row's garbage needs room too.
        needed = int((before + np.full_like(counts, ids.shape[1])).max())
        lease = self._lease_for(cache, len(ids), needed)
        if ids.shape[1] == 1:
            logits = self._decode(lease.buffers, ids, lengths - 1)
        else:
            logits = self._prompt(lease.buffers, ids, lengths - 1, last_only=last_only)
        extended = DeviceCache(lease=lease, lengths=lengths)
        lease.tip = weakref.ref(extended)
        return float32_from(logits, is_bfloat16=_is_bfloat16(self._logits_type)), extended

    def _decode(
        self, buffers: _Buffers, ids: NDArray[np.int64], last: NDArray[np.int32]
    ) -> NDArray[Any]:
        step = self._steps.get(buffers)
        if step is None:
            step = self._steps[buffers] = self._bind_step(buffers)
        step.fed.ids.update_inplace(np.ascontiguousarray(ids))
        step.fed.last.update_inplace(last)
        self._open.run_with_iobinding(step.binding, step.options)
        logits: NDArray[Any] = step.logits.numpy()
        return logits.copy()  # on a CPU that was a view of what the next step overwrites

    def _bind_step(self, buffers: _Buffers) -> _Step:
        """Bind a decode step to buffers for good; the runtime records it in its first runs."""
        shape = [buffers.batch, 1, self.vocabulary_size]
        self._graphs += 1
        step = _Step(
            binding=self._open.io_binding(),
            options=self._options(str(self._graphs)),
            queueing=self._options(str(self._graphs), waits=False),
            fed=_Fed(
                self._on_device(np.zeros((buffers.batch, 1), np.int64)),
                self._on_device(np.zeros(buffers.batch, np.int32)),
                self._on_device(np.zeros(1, np.int64)),
            ),
            logits=self._on_device(np.zeros(shape, NUMPY_TYPES[self._logits_type])),
        )
        # The graph is replayed at every length up to the capacity, so that is the bound it gets.
        self._bind(step.binding, buffers, step.fed, buffers.capacity)
        kind = ONNX_TYPES[self._logits_type]
        step.binding.bind_output("logits", self._device, 0, kind, shape, step.logits.data_ptr())
        return step

    def _prompt(
        self,
        buffers: _Buffers,
        ids: NDArray[np.int64],
        last: NDArray[np.int32],
        *,
        last_only: bool,
    ) -> NDArray[Any]:
        length = ids.shape[1]
        places = np.arange(length - 1 if last_only else 0, length, dtype=np.int64)
        binding = self._open.io_binding()
        fed = _Fed(*(self._on_device(np.ascontiguousarray(array)) for array in (ids, last, places)))
        self._bind(binding, buffers, fed, int(last.max()) + 1)
        logits = np.empty(
            (len(ids), len(places), self.vocabulary_size), NUMPY_TYPES[self._logits_type]
        )
        kind = ONNX_TYPES[self._logits_type]
        binding.bind_output("logits", "cpu", 0, kind, list(logits.shape), logits.ctypes.data)
        self._open.run_with_iobinding(binding, self._options(_NO_GRAPH))
        return logits

    def _options(self, graph: str, *, waits: bool = True) -> Any:
        options = onnxruntime.RunOptions()
        if self._device == "cuda":
            options.add_run_config_entry("gpu_graph_id", graph)
            if not waits:
                options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _bind(self, binding: Any, buffers: _Buffers, fed: _Fed, bound: int) -> None:
        """Bind inputs and caches; `bound` is no less than the longest sequence."""
        given = {
            "input_ids": fed.ids,
            "last_positions": fed.last,
            "logits_at": fed.places,
            # On the host: the runtime reads it when it launches, or records.
            "total_sequence_length": onnxruntime.OrtValue.ortvalue_from_numpy(
                np.array(bound, np.int32)
            ),
        }
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for slot, value in zip(self._slots, buffers.values, strict=True):
            # By address: a buffer of bfloat16 is one of 16-bit integers to NumPy and OrtValue.
            place = (self._device, 0, ONNX_TYPES[slot.type], value.shape(), value.data_ptr())
            binding.bind_input(slot.past, *place)
            binding.bind_output(slot.present, *place)

    @property
    def _open(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise RuntimeError("the session is closed")
        return self._session

    def _lease_for(self, cache: DeviceCache | None, batch: int, length: int) -> _Lease:
        """Buffers with room for so many tokens, with what the cache holds in them.

        Raises:
            ArtifactError: if the model's tables end before.
        """
        if length > self._positions:
            raise ArtifactError(
                f"{length} tokens are more than this engine covers.",
                allowed=f"up to {self._positions} tokens, prompt and answer together",
            )
        if cache is None:
            return self._lease(self._fresh_buffers(batch, _capacity_for(length + _HEADROOM)))
        held = cache.lease.buffers
        tip = cache.lease.tip() if cache.lease.tip else None
        if length <= held.capacity and (tip is None or tip is cache):
            return cache.lease
        # Full, or somebody still holds a cache that went on from this one.
        return self._copy_of(held, max(length, held.capacity))

    def _copy_of(self, held: _Buffers, length: int) -> _Lease:
        """Copy buffers into others with room for so many tokens."""
        copied = self._fresh_buffers(held.batch, _capacity_for(length))
        for old, new in zip(held.values, copied.values, strict=True):
            # By way of the host: a few milliseconds each time that a text doubles.
            room = new.numpy()
            room[:, :, : held.capacity] = old.numpy()
            new.update_inplace(room)
        return self._lease(copied)

    def _fresh_buffers(self, batch: int, capacity: int) -> _Buffers:
        waiting = self._pool.take(batch, capacity)
        if waiting is not None:
            return waiting
        # Zeros, since what an attention kernel reads behind the end must at least be finite.
        shapes = [(slot, (batch, slot.heads, capacity, slot.head_dim)) for slot in self._slots]
        values = [
            self._on_device(np.zeros(shape, NUMPY_TYPES[slot.type])) for slot, shape in shapes
        ]
        return _Buffers(batch, capacity, tuple(values))

    def _on_device(self, array: NDArray[Any]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device)

    def _lease(self, buffers: _Buffers) -> _Lease:
        """Lend buffers until the last cache that uses them is dropped."""
        lease = _Lease(buffers)
        weakref.finalize(lease, self._pool.put, buffers)
        return lease


def _capacity_for(length: int) -> int:
    capacity = _BUCKET
    while capacity < length:
        capacity *= 2
    return capacity


def _is_bfloat16(name: str) -> bool:
    return name == "tensor(bfloat16)"


def _slots_of(session: onnxruntime.InferenceSession) -> tuple[_Slot, ...]:
    return tuple(
        _Slot(
            past=value.name,
            present=value.name.replace("past_key_values.", "present.", 1),
            heads=value.shape[1],
            head_dim=value.shape[3],
            type=value.type,
        )
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    )
