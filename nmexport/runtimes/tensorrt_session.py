"""One TensorRT engine with its KV cache on the device; no torch.

    host                              device
    ids, mask, positions  --upload->  inputs      one execution context for each profile:
                                      caches  <-> prefill: whole prompts, in pieces where long
    logits              <-download--  logits      decode:  one token, replayed as a CUDA graph

The cache is one buffer for each past input, which the engine writes new tokens into; or, where the
engine concatenates, two buffers that take turns.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from nmexport.errors import ArtifactError, EnvironmentFault, UserError
from nmexport.runtimes.engine import DENSE_PLAN, PLAN, REBUILD, read_engine
from nmexport.runtimes.feeds import float32_from, positions_from_mask
from nmexport.runtimes.session import Limits, Session
from nmexport.runtimes.tensorrt import library as tensorrt_library
from nmexport.runtimes.tensorrt.contexts import Contexts, reasons_since
from nmexport.runtimes.tensorrt.cuda_memory import CudaDevice
from nmexport.runtimes.tensorrt.engine_tensors import NUMPY_TYPES, cache_slots, tensor_types
from nmexport.runtimes.tensorrt.kernel_cache import KernelCache, kernel_cache_path
from nmexport.runtimes.tensorrt.requirements import check_runnable, engine_plugin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import TensorRTEngine
    from nmexport.runtimes.tensorrt.cuda_memory import Buffer, Device, Graph
    from nmexport.runtimes.tensorrt.library import Messages


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorRTCache:
    """A KV cache on the device."""

    mask: NDArray[np.int64]
    """`[B, P]`; 0 where a sequence is padded on the left."""
    buffers: tuple[Buffer, ...] | None = None
    """A copy that later runs do not change. None: it lies in the session's own buffers, which an
    engine with recorded decode steps cannot do without, until the session runs something else."""


class TensorRTSession(Session):
    """An engine on TensorRT; one cache at a time lies in its buffers."""

    exposes_cache = True
    on_gpu = True
    cache: TensorRTCache | None = None

    def __init__(
        self,
        *,
        trt: Any,
        plan: bytes,
        engine: TensorRTEngine,
        device: Device,
        logger: Messages,
        kernels: KernelCache | None = None,
    ) -> None:
        """Open a plan.

        Args:
            trt: The TensorRT module.
            plan: The plan's bytes.
            engine: Its description.
            device: Where it runs.
            logger: Of that module.
            kernels: Where TensorRT-RTX keeps what it compiles.

        Raises:
            ArtifactError: if TensorRT refuses the plan, or its cache has foreign names.
        """
        self._described = engine
        self._device = device
        self._kernels = kernels
        self.runtime = f"{engine.target} {engine.version}"
        mark = logger.mark()
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            reasons = reasons_since(logger, mark)
            raise ArtifactError(
                f"{engine.target} cannot open the engine: {reasons}",
                fix="run `nmexport engine --force` on this machine",
            )
        self._types = tensor_types(self._engine)
        self._slots = cache_slots(self._engine, self._types)
        self._logits_type = NUMPY_TYPES[self._types["logits"]]
        self._vocabulary_size = int(self._engine.get_tensor_shape("logits")[2])
        self._contexts = Contexts(
            trt, self._engine, engine, device=device, logger=logger, kernels=kernels
        )
        self._batch = 0
        self._resident: TensorRTCache | None = None  # what lies in the buffers
        self._caches: list[tuple[Buffer, ...]] = []  # one set in place, two that take turns
        self._buffers: dict[str, Buffer] = {}
        self._graph: Graph | None = None
        self._cannot_record = False
        self._decoded_shape: tuple[int, ...] | None = None

    @classmethod
    def from_engine(cls, path: Path, *, side: Literal["sparse", "dense"] = "sparse") -> Self:
        """Open what `engine.json` describes.

        Args:
            path: `engine.json`, or the folder that holds it.
            side: Which model.

        Raises:
            EnvironmentFault: if this machine cannot run the engine; says why.
            ArtifactError: if the engine or its plugin library is not the one described.
        """
        engine = read_engine(path).tensorrt
        if engine is None:
            raise ArtifactError(f"{path} describes no TensorRT engine.", fix=REBUILD)
        check_runnable(engine)
        folder = path.parent if path.suffix == ".json" else path
        trt = tensorrt_library.load(engine.target)
        logger = tensorrt_library.logger_of(engine.target)
        device = CudaDevice()
        plugin = None if side == "dense" else engine_plugin(engine)
        if plugin is not None:
            tensorrt_library.register_plugin(engine.target, plugin)
        tensorrt_library.preload_cublaslt()
        try:
            plan = (folder / (DENSE_PLAN if side == "dense" else PLAN)).read_bytes()
        except OSError as error:
            raise ArtifactError(f"The plan cannot be read: {error}") from error
        kernels = KernelCache(kernel_cache_path(engine, plan))
        return cls(trt=trt, plan=plan, engine=engine, device=device, logger=logger, kernels=kernels)

    # -- the interface ----------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    @property
    def limits(self) -> Limits:
        """Those of its optimization profiles."""
        return Limits(batch=self._described.max_batch, tokens=self._described.max_context)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache."""
        return sum(slot.bytes_of(1, 1) for slot in self._slots)

    def keep(self, cache: TensorRTCache) -> TensorRTCache:
        """Copy a cache on the device; see `Session`."""
        if cache.buffers is not None:
            return cache
        self._check_resident(cache)
        copies = []
        for slot, buffer in zip(self._slots, self._caches[0], strict=True):
            size = slot.bytes_of(self._batch, self._cache_tokens(cache))
            copied = self._device.allocate(size)
            self._device.copy(buffer, copied, size)
            copies.append(copied)
        return TensorRTCache(mask=cache.mask, buffers=tuple(copies))

    def resume(self, cache: TensorRTCache) -> TensorRTCache:
        """Copy a kept cache into the session's buffers; see `Session`."""
        if cache.buffers is None:
            self._check_resident(cache)
            return cache
        self._begin(cache.mask.shape[0])
        for slot, source, buffer in zip(self._slots, cache.buffers, self._caches[0], strict=True):
            size = slot.bytes_of(self._batch, self._cache_tokens(cache))
            self._device.copy(source, buffer, size)
        self._device.wait()
        self._resident = TensorRTCache(mask=cache.mask)
        return self._resident

    def cache_values(self, cache: TensorRTCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """See `Session`."""
        if cache.buffers is None:
            self._check_resident(cache)
        batch, cached = cache.mask.shape
        buffers = self._caches[0] if cache.buffers is None else cache.buffers
        for slot, buffer in zip(self._slots, buffers, strict=True):
            kind = self._types[slot.past]
            whole = np.empty(slot.shape(batch, self._cache_tokens(cache)), NUMPY_TYPES[kind])
            self._device.download(buffer, whole)
            yield (
                slot.present,
                float32_from(whole[:, :, :cached], is_bfloat16=kind == "BF16"),
            )

    def extend(
        self,
        cache: TensorRTCache | None,
        input_ids: NDArray[np.int64],
        new_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], TensorRTCache]:
        """See `Session`.

        Args:
            cache: The cache, or None.
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            new_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens.

        Raises:
            UserError: if batch or tokens are more than the engine was built for.
            RuntimeError: if another run has overwritten the cache.
        """
        mask = np.ones_like(input_ids) if new_mask is None else new_mask
        if cache is None:
            self._begin(input_ids.shape[0])
            before = TensorRTCache(mask=np.ascontiguousarray(mask[:, :0], dtype=np.int64))
            self._resident = before
        else:
            before = self.resume(cache)
        if cache is not None and input_ids.shape[1] == 1:
            return self._run("decode", before, input_ids, mask)
        pieces = []
        step = self._described.max_sequence
        for start in range(0, input_ids.shape[1], step):
            rows = slice(start, min(start + step, input_ids.shape[1]))
            logits, before = self._run("prefill", before, input_ids[:, rows], mask[:, rows])
            pieces.append(logits)
        return np.concatenate(pieces, axis=1), before

    def close(self) -> None:
        """Free the engine and its cache."""
        self._device.wait()
        self.cache = self._resident = None
        if self._kernels is not None:
            self._kernels.save()
        self._graph = None
        self._contexts.clear()
        self._caches.clear()
        self._buffers.clear()
        self._engine = None
        self._runtime = None

    # -- one run ----------------------------------------------------------------------------------

    def _run(
        self,
        profile: str,
        cache: TensorRTCache,
        input_ids: NDArray[np.int64],
        new_mask: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], TensorRTCache]:
        """Run S new tokens after the cached ones."""
        cached = cache.mask
        batch, new_tokens = input_ids.shape
        self._check_room(batch, cached.shape[1] + new_tokens)
        self._resident = None  # until the run is done, the buffers hold no cache that counts
        mask = np.concatenate([cached, new_mask.astype(np.int64, copy=False)], axis=1)
        for name, array in self._feeds(input_ids, mask, cached.shape[1]).items():
            self._device.upload(array, self._buffer(name, array.nbytes))
        logits = np.empty((batch, new_tokens, self._vocabulary_size), self._logits_type)
        buffer = self._buffer("logits", logits.nbytes)
        if profile == "decode" and self._described.in_place_cache:
            self._replay_decode((batch, cached.shape[1], new_tokens))
        else:
            self._enqueue(profile, (batch, cached.shape[1], new_tokens))
        self._device.download(buffer, logits)
        if not self._described.in_place_cache:
            self._caches.reverse()  # what was written is what is read next
        self._resident = TensorRTCache(mask=mask)
        is_bfloat16 = self._types["logits"] == "BF16"
        return float32_from(logits, is_bfloat16=is_bfloat16), self._resident

    def _feeds(
        self, input_ids: NDArray[np.int64], mask: NDArray[np.int64], cached: int
    ) -> dict[str, NDArray[np.int64]]:
        """Inputs other than the cache, by name."""
        batch, new_tokens = input_ids.shape
        feeds = {
            "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
            "attention_mask": mask,
            "position_ids": positions_from_mask(mask, new_tokens),
        }
        if self._described.in_place_cache:
            whole = np.zeros((batch, self._described.max_context), np.int64)
            whole[:, : mask.shape[1]] = mask
            feeds["attention_mask"] = whole
            feeds["write_indices"] = np.full(batch, cached, np.int64)
        # A model without positions of its own has no such input.
        return {name: array for name, array in feeds.items() if name in self._types}

    def _enqueue(self, profile: str, sizes: tuple[int, int, int]) -> None:
        """Bind shapes and addresses, and run; `sizes` are batch, cached and new tokens."""
        self._contexts.enqueue(profile, self._input_shapes(*sizes), self._bindings())

    def _replay_decode(self, sizes: tuple[int, int, int]) -> None:
        """Run a decode step: bound and run once for a batch, then recorded, then replayed.

        With the cache in place, nothing that the driver records changes from step to step: shapes,
        addresses and kernels are the same, and the number of cached tokens is data.
        """
        shape = (sizes[0],)
        if self._decoded_shape != shape:
            self._graph = None
            self._enqueue("decode", sizes)
            self._decoded_shape = shape
            return
        if self._graph is None and not self._contexts.records_itself and not self._cannot_record:
            self._graph = self._record_decode()
        if self._graph is None:
            self._contexts.execute("decode")
        else:
            self._graph.launch()

    def _record_decode(self) -> Graph | None:
        """A decode step as a CUDA graph; None where it cannot be recorded, and runs as before."""
        self._device.wait()
        try:
            return self._device.capture(lambda: self._contexts.execute("decode"))
        except (EnvironmentFault, ArtifactError) as fault:
            self._cannot_record = True
            logging.getLogger(__name__).warning(
                "decode steps run without a CUDA graph: %s", fault.problem
            )
            return None

    # -- shapes and memory ------------------------------------------------------------------------

    def _input_shapes(self, batch: int, cached: int, new_tokens: int) -> dict[str, tuple[int, ...]]:
        in_place = self._described.in_place_cache
        total = self._described.max_context if in_place else cached + new_tokens
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (batch, new_tokens),
            "attention_mask": (batch, total),
            "position_ids": (batch, new_tokens),
            "write_indices": (batch,),
        }
        past = self._described.max_context if in_place else cached
        shapes |= {slot.past: slot.shape(batch, past) for slot in self._slots}
        return {name: shape for name, shape in shapes.items() if name in self._types}

    def _bindings(self) -> Mapping[str, Buffer]:
        """Buffers of all inputs and outputs by name."""
        bindings = {name: self._buffers[name] for name in self._buffers if name in self._types}
        for index, slot in enumerate(self._slots):
            bindings[slot.past] = self._caches[0][index]
            bindings[slot.present] = self._caches[-1][index]
        return bindings

    def _begin(self, batch: int) -> None:
        """Make caches for a batch; those of the same batch are used again."""
        if batch > self._described.max_batch:
            raise UserError(
                f"The batch has {batch} sequences.",
                allowed=f"at most {self._described.max_batch}",
                fix="build the engine with a larger engine.max_batch",
            )
        if batch == self._batch:
            return
        self._caches.clear()
        self._decoded_shape = self._graph = None
        sets = 1 if self._described.in_place_cache else 2
        capacity = self._described.max_context
        for _ in range(sets):
            self._caches.append(
                tuple(self._device.allocate(slot.bytes_of(batch, capacity)) for slot in self._slots)
            )
        self._batch = batch

    def _buffer(self, name: str, size: int) -> Buffer:
        """The buffer of an input or of the logits, large enough."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            self._device.wait()
            buffer = self._buffers[name] = self._device.allocate(size)
            self._decoded_shape = self._graph = None  # it knew the old address
        return buffer

    def _check_room(self, batch: int, total: int) -> None:
        if batch != self._batch:
            raise UserError(
                f"{batch} sequences go on where {self._batch} were prefilled.",
                allowed=str(self._batch),
            )
        if total > self._described.max_context:
            raise UserError(
                f"{total} tokens do not fit into the engine's context.",
                allowed=f"at most {self._described.max_context}, prompt and new tokens together",
                fix="build the engine with a larger engine.max_context",
            )

    def _check_resident(self, cache: TensorRTCache) -> None:
        if cache is not self._resident:
            raise RuntimeError("another run has overwritten this cache; `keep` it before")

    def _cache_tokens(self, cache: TensorRTCache) -> int:
        """Tokens that a cache buffer is laid out for."""
        if self._described.in_place_cache:
            return self._described.max_context
        return int(cache.mask.shape[1])
