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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import onnxruntime
from nmexport.errors import ArtifactError
from nmexport.runtimes.feeds import float32_from
from nmexport.runtimes.session import Closing, Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_BUCKET = 512
"""Capacities are this times a power of two: few shapes, few graphs, and growth is rare."""
_NO_GRAPH = "-1"
_ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(np.uint16),  # the bits: NumPy has no such type
}

Device = Literal["cuda", "cpu"]


@dataclass(eq=False)
class _Buffers:
    """Device memory of one batch of sequences, and the decode step that is bound to it."""

    batch: int
    capacity: int
    """Tokens of a sequence."""
    values: tuple[Any, ...]
    """One OrtValue `[B, H, capacity, D]` for each past input."""
    step: _Step | None = None


@dataclass(frozen=True)
class _Fed:
    """What a run reads beside caches, on the device."""

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
    fed: _Fed
    logits: Any
    """`[B, 1, V]`."""


@dataclass(eq=False)
class _Lease:
    """Holds buffers until the last cache that uses them is dropped."""

    buffers: _Buffers


@dataclass(frozen=True, kw_only=True)
class DeviceCache:
    """The first `lengths` tokens in some buffers.

    A cache stays valid while others that go on from it write behind its end. Two that go on from
    the same one overwrite each other.
    """

    lease: _Lease
    lengths: NDArray[np.int32]
    """Tokens of each sequence `[B]`."""


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


class CudaSession(Closing):
    """A model with its KV cache in place; implements `runtimes.session.Session`.

    Not shared between threads.
    """

    threads: int | None = None

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        *,
        positions: int,
        device: Device = "cuda",
        runtime: str = f"onnxruntime {onnxruntime.__version__}",
    ) -> None:
        """Take over an open session.

        Args:
            session: A model as `graph.cuda` rewrites it, opened with CUDA graphs enabled where the
                device is `cuda`.
            positions: Tokens of a sequence that its rotary tables cover.
            device: `cpu` computes the same without a GPU, for tests.
            runtime: What runs the model, as reports name it.
        """
        self._session: onnxruntime.InferenceSession | None = session
        self._device = device
        self._slots = _slots_of(session)
        logits = {value.name: value for value in session.get_outputs()}["logits"]
        self._logits_type: str = logits.type
        self._state: DeviceCache | None = None
        self._pool = _Pool()
        self._graphs = 0
        self._positions = positions
        self.runtime = runtime
        self.vocabulary_size: int = logits.shape[2]
        self.limits = Limits(tokens=positions)

    @property
    def element_type(self) -> np.dtype[Any]:
        """T: the type of activations."""
        if self._logits_type == "tensor(bfloat16)":
            import ml_dtypes  # which a server does without

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        return _NUMPY_TYPES[self._logits_type]

    @property
    def cache_bytes_per_token(self) -> int:
        """What one token of one sequence takes in a cache."""
        return sum(
            slot.heads * slot.head_dim * _NUMPY_TYPES[slot.type].itemsize for slot in self._slots
        )

    @property
    def state(self) -> DeviceCache:
        """The cache as it stands; see `DeviceCache` for how long.

        Raises:
            RuntimeError: if nothing has run yet.
        """
        if self._state is None:
            raise RuntimeError("decode_step or state before the first prefill")
        return self._state

    def restore(self, state: DeviceCache) -> None:
        """Continue from a state that a session of this architecture gave before."""
        self._state = state

    def prefill(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        last_only: bool = False,
    ) -> NDArray[np.float32]:
        """Drop the cache, run whole prompts, and return logits `[B, S, V]`.

        Args:
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            attention_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens.
            last_only: Return the last token's logits `[B, 1, V]`.
        """
        self._state = None
        batch, length = input_ids.shape
        counts = np.full(batch, length) if attention_mask is None else attention_mask.sum(axis=1)
        rows = [row[length - count :] for row, count in zip(input_ids, counts, strict=True)]
        is_ragged = bool((counts != length).any())
        logits, self._state = self._run(rows, None, last_only=last_only and not is_ragged)
        if is_ragged:  # the session pads on the right
            for row, count in zip(logits, counts, strict=True):
                row[length - count :] = row[:count].copy()
            logits = logits[:, -1:] if last_only else logits
        return logits

    def decode_step(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one more token a sequence, `[B, 1]`, on the cache, and return logits `[B, 1, V]`."""
        logits, self._state = self._run(list(input_ids), self.state)
        return logits

    def extend(
        self, cache: DeviceCache | None, input_ids: NDArray[np.int64], *, last_only: bool = False
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """Run tokens `[1, S]` of one sequence on its own cache; see `runtimes.session.Extendable`.

        The session's own cache, `state`, is left as it was.
        """
        return self._run(list(input_ids), cache, last_only=last_only)

    def cache_values(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Keys and values `[B, H, P, D]` under their outputs' names, layer by layer."""
        length = int(self.state.lengths.max())
        for slot, value in zip(self._slots, self.state.lease.buffers.values, strict=True):
            elements = value.numpy()[:, :, :length]
            yield slot.present, float32_from(elements, is_bfloat16=slot.type.endswith("bfloat16)"))

    def close(self) -> None:
        """Free the model and its caches."""
        self._state = None
        self._pool.free.clear()
        self._session = None

    def _run(
        self,
        rows: Sequence[NDArray[np.int64]],
        cache: DeviceCache | None,
        *,
        last_only: bool = False,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """Run the rows' tokens after those in the cache; shorter rows get garbage at their end."""
        counts = np.array([len(row) for row in rows], np.int32)
        before = np.zeros(len(rows), np.int32) if cache is None else cache.lengths
        lengths = before + counts
        lease = self._lease_for(cache, len(rows), int(lengths.max()))
        ids = np.zeros((len(rows), int(counts.max())), np.int64)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = row
        if ids.shape[1] == 1:
            logits = self._decode(lease.buffers, ids, lengths - 1)
        else:
            logits = self._prompt(lease.buffers, ids, lengths - 1, last_only=last_only)
        result = float32_from(logits, is_bfloat16=self._logits_type.endswith("bfloat16)"))
        return result, DeviceCache(lease=lease, lengths=lengths)

    def _decode(
        self, buffers: _Buffers, ids: NDArray[np.int64], last: NDArray[np.int32]
    ) -> NDArray[Any]:
        if buffers.step is None:
            buffers.step = self._bound_step(buffers)
        step = buffers.step
        step.fed.ids.update_inplace(ids)
        step.fed.last.update_inplace(last)
        self._open.run_with_iobinding(step.binding, step.options)
        logits: NDArray[Any] = step.logits.numpy()
        return logits

    def _bound_step(self, buffers: _Buffers) -> _Step:
        """Bind a decode step to buffers for good; the runtime records it in its first runs."""
        shape = [buffers.batch, 1, self.vocabulary_size]
        kind = _ELEMENT_TYPES[self._logits_type]
        options = onnxruntime.RunOptions()
        if self._device == "cuda":
            self._graphs += 1
            options.add_run_config_entry("gpu_graph_id", str(self._graphs))
        step = _Step(
            binding=self._open.io_binding(),
            options=options,
            fed=_Fed(
                self._on_device(np.zeros((buffers.batch, 1), np.int64)),
                self._on_device(np.zeros(buffers.batch, np.int32)),
                self._on_device(np.zeros(1, np.int64)),
            ),
            logits=self._on_device(np.zeros(shape, _NUMPY_TYPES[self._logits_type])),
        )
        # The graph is replayed at every length up to the capacity, so that is the bound it gets.
        self._bind(step.binding, buffers, step.fed, buffers.capacity)
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
        fed = _Fed(*(self._on_device(array) for array in (ids, last, places)))
        self._bind(binding, buffers, fed, int(last.max()) + 1)
        logits = np.empty(
            (len(ids), len(places), self.vocabulary_size), _NUMPY_TYPES[self._logits_type]
        )
        kind = _ELEMENT_TYPES[self._logits_type]
        binding.bind_output("logits", "cpu", 0, kind, list(logits.shape), logits.ctypes.data)
        options = onnxruntime.RunOptions()
        if self._device == "cuda":
            options.add_run_config_entry("gpu_graph_id", _NO_GRAPH)
        self._open.run_with_iobinding(binding, options)
        return logits

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
            place = (self._device, 0, _ELEMENT_TYPES[slot.type], value.shape(), value.data_ptr())
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
            return self._lease(self._fresh_buffers(batch, self._capacity_for(length)))
        held = cache.lease.buffers
        if length <= held.capacity:
            return cache.lease
        larger = self._fresh_buffers(batch, self._capacity_for(length))
        for old, new in zip(held.values, larger.values, strict=True):
            # By way of the host: a few milliseconds each time that a text doubles.
            room = new.numpy()
            room[:, :, : held.capacity] = old.numpy()
            new.update_inplace(room)
        return self._lease(larger)

    def _capacity_for(self, length: int) -> int:
        capacity = _BUCKET
        while capacity < length:
            capacity *= 2
        return capacity

    def _fresh_buffers(self, batch: int, capacity: int) -> _Buffers:
        waiting = self._pool.take(batch, capacity)
        if waiting is not None:
            return waiting
        values = tuple(self._zeros(slot, batch, capacity) for slot in self._slots)
        return _Buffers(batch, capacity, values)

    def _zeros(self, slot: _Slot, batch: int, capacity: int) -> Any:
        """Zeros, since what an attention kernel reads behind the end must at least be finite."""
        zeros = np.zeros((batch, slot.heads, capacity, slot.head_dim), _NUMPY_TYPES[slot.type])
        return self._on_device(zeros)

    def _on_device(self, array: NDArray[Any]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device)

    def _lease(self, buffers: _Buffers) -> _Lease:
        """Lend buffers until the last cache that uses them is dropped."""
        lease = _Lease(buffers)
        weakref.finalize(lease, self._pool.put, buffers)
        return lease


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
