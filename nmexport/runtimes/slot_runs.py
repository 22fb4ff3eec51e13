"""Runs of a session with slots: the one decode step of all slots, and prompts in one of them.

Runs are started without waiting for them. What they read and write lies at fixed addresses, so
whoever starts a run of a kind waits for the last one of that kind first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nmexport.runtimes.cuda_model import CHOSEN, LOGITS, NO_GRAPH, CudaModel, Place
from nmexport.runtimes.device_cache import zero_buffers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from nmexport.runtimes.slots import Slots

_GRAPH = "1"
_RECORDING_RUNS = 3
"""Runs of a step at the start: one as any other, one that the recorder watches, one replayed."""
_UNIT = 64
"""Tokens that a buffer's size is a multiple of."""


class SlotBuffers:
    """Caches of all slots, on the device."""

    def __init__(self, model: CudaModel, *, slots: int, tokens: int) -> None:
        """Make them.

        Args:
            model: Says what a cache is made of.
            slots: S.
            tokens: Tokens of a sequence at most.
        """
        self.slots = slots
        self.capacity = -(-tokens // _UNIT) * _UNIT
        """Tokens that a slot has memory for."""
        self._values = zero_buffers(model.cache_tensors, slots, self.capacity, model.device)
        self._slot_bytes = [self.capacity * tensor.token_bytes for tensor in model.cache_tensors]

    def places(self) -> list[Place]:
        """All slots of each tensor, `[S, H, capacity, D]`."""
        return [(value.shape(), value.data_ptr()) for value in self._values]

    def places_of(self, slot: int) -> list[Place]:
        """One slot's part of each tensor, `[1, H, capacity, D]`."""
        return [
            ([1, *shape[1:]], address + slot * size)
            for (shape, address), size in zip(self.places(), self._slot_bytes, strict=True)
        ]


class StepRuns:
    """The decode step of all slots."""

    def __init__(self, model: CudaModel, buffers: SlotBuffers, slots: Slots, *, most: int) -> None:
        """Bind it.

        Args:
            model: The model.
            buffers: The caches.
            slots: How far the sequences are.
            most: The last position that a token may have.
        """
        count = buffers.slots
        self._model = model
        self._slots = slots
        self._most = most
        self._binding: Any = model.session.io_binding()
        self._options = model.options(_GRAPH, waits=False)
        self._ids = model.visible(count, 1)
        self._chosen = model.visible(count, 1)
        self._last = model.on_device(np.zeros(count, np.int32))
        self._logits = model.on_device(
            np.zeros((count, 1, model.vocabulary_size), model.logits_dtype)
        )
        self._ahead: Mapping[int, tuple[int, int]] = {}
        """Token and position by slot in a step that nobody has asked for yet."""
        # The graph is replayed at every length up to the capacity, so that is the bound it gets.
        model.bind_bound(self._binding, buffers.capacity)
        model.bind_caches(self._binding, buffers.places())
        self._binding.bind_input("input_ids", *model.place(self._ids))
        self._binding.bind_ortvalue_input("last_positions", self._last)
        at = model.on_device(np.zeros(1, np.int64))
        self._binding.bind_ortvalue_input("logits_at", at)
        self._binding.bind_output(CHOSEN, *model.place(self._chosen))
        model.bind_logits(self._binding, self._logits)

    def record(self) -> None:
        """Run it with empty slots until the runtime replays a recorded graph."""
        options = self._model.options(_GRAPH)
        for _ in range(_RECORDING_RUNS):
            self._model.session.run_with_iobinding(self._binding, options)

    def start(self, rows: Mapping[int, tuple[int, int]]) -> None:
        """Start a step, unless the one started ahead covers it.

        Args:
            rows: By slot, a token and its position.
        """
        is_there = rows.items() <= self._ahead.items()
        self._ahead = {}
        if not is_there:
            self._model.wait()
            self._run(rows)

    def start_ahead(self, rows: Mapping[int, tuple[int, int]]) -> None:
        """Start the step that probably comes next; nothing else may be running.

        A step that computes more than is asked for is as good: each row is computed alone. One that
        nobody asks for has written behind the ends of sequences, and is forgotten.
        """
        self._run(rows)
        self._ahead = rows

    def finish(self) -> None:
        """Wait for the step that was started, and forget it."""
        self._ahead = {}
        self._model.wait()

    def _run(self, rows: Mapping[int, tuple[int, int]]) -> None:
        # A slot that takes no part is computed too, and thrown away: what it writes lies behind its
        # sequence's end, where the next token will be.
        last = np.minimum(self._slots.ends, self._most)
        for slot, (token, position) in rows.items():
            self._ids[slot, 0] = token
            last[slot] = position
        self._last.update_inplace(last)
        self._model.session.run_with_iobinding(self._binding, self._options)

    def chosen(self) -> NDArray[np.int64]:
        """The likeliest next token of each slot `[S]`, after the wait for the step."""
        return self._chosen[:, 0].copy()

    def logits(self) -> NDArray[np.float32]:
        """Logits of each slot `[S, V]`, after the wait for the step."""
        return self._model.read_logits(self._logits)[:, 0]

    def close(self) -> None:
        """Let go of the runtime's session."""
        self._binding = None


class PromptRuns:
    """Chunks of prompts, each in a slot of its own."""

    def __init__(self, model: CudaModel, buffers: SlotBuffers, *, chunk: int) -> None:
        """Bind what stays where it is.

        Args:
            model: The model.
            buffers: The caches.
            chunk: Tokens of a chunk; the last one of a prompt may have one more.
        """
        self._model = model
        self._options = model.options(NO_GRAPH, waits=False)
        self._slots = [_PromptSlot(model, buffers, slot, chunk) for slot in range(buffers.slots)]

    def start(self, slot: int, tokens: NDArray[np.int64], before: int) -> None:
        """Start a chunk of tokens `[S]` behind the first `before` in a slot."""
        place = self._slots[slot]
        place.fill(self._model, tokens, before)
        self._model.session.run_with_iobinding(place.binding, self._options)

    def chosen(self, slot: int) -> int:
        """The likeliest token after a slot's last chunk, after the wait for it."""
        return int(self._slots[slot].chosen[0, 0])

    def logits(self, slot: int) -> NDArray[np.float32]:
        """Logits `[V]` after a slot's last chunk, after the wait for it."""
        row: NDArray[np.float32] = self._model.read_logits(self._slots[slot].logits)[0, 0]
        return row

    def all_logits(self, slot: int, tokens: NDArray[np.int64], before: int) -> NDArray[np.float32]:
        """Run a chunk, and return the logits of each of its tokens `[S, V]`."""
        model, place = self._model, self._slots[slot]
        binding = model.session.io_binding()
        model.bind_caches(binding, place.caches)
        model.bind_bound(binding, before + len(tokens))
        at = np.arange(len(tokens), dtype=np.int64)
        last = np.array([before + len(tokens) - 1], np.int32)
        given = {"input_ids": tokens[None], "last_positions": last, "logits_at": at}
        for name, array in given.items():
            binding.bind_ortvalue_input(name, model.on_device(np.ascontiguousarray(array)))
        values = model.bind_host_output(binding, LOGITS, (1, len(tokens)))
        model.session.run_with_iobinding(binding, model.options(NO_GRAPH))
        return model.to_float32(values[0])

    def close(self) -> None:
        """Let go of the runtime's session."""
        self._slots.clear()


class _PromptSlot:
    """Arrays that prompts in one slot read and write, bound once."""

    def __init__(self, model: CudaModel, buffers: SlotBuffers, slot: int, chunk: int) -> None:
        self.binding: Any = model.session.io_binding()
        self.caches = buffers.places_of(slot)
        self.chosen = model.visible(1, 1)
        self.logits = model.on_device(np.zeros((1, 1, model.vocabulary_size), model.logits_dtype))
        self._ids = model.visible(1, chunk + 1)
        self._at = model.visible(1)
        self._last = model.on_device(np.zeros(1, np.int32))
        model.bind_caches(self.binding, self.caches)
        self.binding.bind_ortvalue_input("last_positions", self._last)
        self.binding.bind_input("logits_at", *model.place(self._at))
        self.binding.bind_output(CHOSEN, *model.place(self.chosen))
        model.bind_logits(self.binding, self.logits)

    def fill(self, model: CudaModel, tokens: NDArray[np.int64], before: int) -> None:
        count = len(tokens)
        ids = self._ids[:, :count]
        ids[0] = tokens
        self._at[0] = count - 1
        self._last.update_inplace(np.array([before + count - 1], np.int32))
        self.binding.bind_input("input_ids", *model.place(ids))
        model.bind_bound(self.binding, before + count)
