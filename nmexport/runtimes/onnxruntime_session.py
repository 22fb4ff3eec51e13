"""One exported model on ONNX Runtime, on the CPU or a CUDA GPU, with its KV cache."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import onnxruntime
from nmexport.environment import physical_cores
from nmexport.errors import ArtifactError
from nmexport.runtimes import native
from nmexport.runtimes.engine import Provider, read_engine
from nmexport.runtimes.feeds import float32_from, positions_from_mask
from nmexport.runtimes.native import HUGE_PAGES_ENTRY
from nmexport.runtimes.onnxruntime_opening import (
    NUMPY_TYPES,
    ONNX_TYPES,
    RUNTIME,
    SESSION_CONFIG,
    fits_huge_pages,
    open_inference_session,
    provider_here,
    session_options,
)
from nmexport.runtimes.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from nmexport.runtimes.engine import Side

_HOST = "cpu"


@dataclass(frozen=True, kw_only=True)
class OrtCache:
    """A KV cache after a run; no later run changes it."""

    past: tuple[Any, ...]
    """One OrtValue `[B, H, P, D]` for each past input."""
    mask: NDArray[np.int64]
    """Attention mask `[B, P]`; 0 where a sequence is padded on the left."""


@dataclass(frozen=True, kw_only=True)
class _CacheSlot:
    """One past input and the present output that follows it."""

    past: str
    present: str
    heads: int
    head_dim: int
    element_type: int
    element_bytes: int


def _cache_slots(session: onnxruntime.InferenceSession) -> tuple[_CacheSlot, ...]:
    outputs = {value.name for value in session.get_outputs()}
    slots = []
    for value in session.get_inputs():
        if not value.name.startswith("past_key_values."):
            continue
        present = value.name.replace("past_key_values.", "present.", 1)
        heads, head_dim = value.shape[1], value.shape[3]
        if present not in outputs or not isinstance(heads, int) or not isinstance(head_dim, int):
            raise ArtifactError(
                f"Cache input {value.name} has shape {value.shape} and no match among the outputs.",
                allowed="past_key_values.{i}.key|value [batch, heads, past, head_dim] with "
                "present.{i}.key|value",
            )
        slots.append(
            _CacheSlot(
                past=value.name,
                present=present,
                heads=heads,
                head_dim=head_dim,
                element_type=ONNX_TYPES[value.type],
                element_bytes=NUMPY_TYPES[value.type].itemsize,
            )
        )
    return tuple(slots)


def _bits(value: Any) -> NDArray[np.uint16]:
    """Read a bfloat16 OrtValue on the host, which NumPy cannot, as 16-bit integers."""
    count = math.prod(value.shape())
    held = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.ctypeslib.as_array(held).reshape(value.shape())


class OrtSession(Session):
    """A model on ONNX Runtime.

    Caches stay inside ONNX Runtime: what one run returns is bound as the next run's input, and
    never passes through NumPy.
    """

    runtime = RUNTIME
    exposes_cache = True
    cache: OrtCache | None = None

    def __init__(
        self,
        model: Path | bytes,
        *,
        library: Path | None = None,
        threads: int | None = None,
        config: Mapping[str, str] = SESSION_CONFIG,
        provider: Provider = "cpu",
        bfloat16: bool = False,
        folds_constants: bool = True,
    ) -> None:
        """Open the model.

        Args:
            model: The ONNX file with its external data next to it; or a serialised model, whose
                external data lies in the folder that `config` names under `EXTERNAL_DATA_FOLDER`.
            library: Native op library to register; None runs the function bodies in the file.
            threads: Intra-op threads; None takes the physical cores this process may use.
            config: ONNX Runtime session configuration entries. Without one about huge pages, the
                native library copies weights into them where they take a quarter of the free
                memory at most.
            provider: Where to compute.
            bfloat16: The model is in bfloat16, and not yet rewritten for a CPU.
            folds_constants: See `open_inference_session`.

        Raises:
            EnvironmentFault: if the library is missing or does not load, or the provider does not
                work here.
            ArtifactError: if the model is missing or corrupt, or its cache has foreign names.
        """
        self.threads = threads or physical_cores()
        # An instrumented model runs too briefly to gain.
        copies = not isinstance(model, bytes) and fits_huge_pages(model.parent)
        pages = {HUGE_PAGES_ENTRY: "1" if copies else "0"}
        options = session_options(library=library, threads=self.threads, config={**pages, **config})
        self._device: Provider = provider
        self.on_gpu = provider == "cuda"
        self._session: onnxruntime.InferenceSession | None = open_inference_session(
            model, options, provider, bfloat16=bfloat16, folds_constants=folds_constants
        )
        self._slots = _cache_slots(self._session)
        self._inputs = {value.name for value in self._session.get_inputs()}
        logits = {value.name: value for value in self._session.get_outputs()}.get("logits")
        if logits is None or not isinstance(logits.shape[2], int):
            raise ArtifactError("The model has no output logits [batch, sequence, vocabulary].")
        self._logits_type: str = logits.type
        self._vocabulary_size: int = logits.shape[2]
        self.watched: dict[str, NDArray[Any]] = {}
        """Outputs that `watch` asked for, from the last run."""
        self._watched_names: tuple[str, ...] = ()

    @classmethod
    def from_engine(cls, path: Path, *, side: Side = "sparse", elsewhere: bool = False) -> Self:
        """Open what `engine.json` describes.

        Args:
            path: `engine.json`, or the folder that holds it.
            side: Which model.
            elsewhere: Where this ONNX Runtime was built without the provider that the engine
                names, compute on the CPU; a warning says so.

        Raises:
            ArtifactError: see `read_engine`, `engine_library`.
            EnvironmentFault: if the native library that the engine needs is missing here.
        """
        engine = read_engine(path)
        provider = provider_here(engine.provider) if elsewhere else engine.provider
        model = engine.model_for(provider, side)
        rewritten = engine.needs_rewrite(provider, side)
        if model is None:
            raise ArtifactError(
                f"{path} has no {side} model.", fix="build it again without --no-dense-baseline"
            )
        return cls(
            model,
            # A baseline needs none, unless it is in bfloat16: see `graph.cpu`.
            library=native.engine_library(engine) if side != "dense" or rewritten else None,
            threads=engine.threads,
            config=engine.session_config,
            provider=provider,
            bfloat16=rewritten,
        )

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        return self._vocabulary_size

    @property
    def element_type(self) -> np.dtype[Any]:
        """T: the type of activations."""
        if self._logits_type == "tensor(bfloat16)":
            import ml_dtypes  # which a server does without

            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        return NUMPY_TYPES[self._logits_type]

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache."""
        return sum(slot.heads * slot.head_dim * slot.element_bytes for slot in self._slots)

    def keep(self, cache: OrtCache) -> OrtCache:
        """See `Session`."""
        return cache

    def cache_values(self, cache: OrtCache) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """See `Session`."""
        for slot, value in zip(self._slots, cache.past, strict=True):
            is_bfloat16 = slot.element_type == ONNX_TYPES["tensor(bfloat16)"]
            elements = _bits(value) if is_bfloat16 and self._device == "cpu" else value.numpy()
            yield slot.present, float32_from(elements, is_bfloat16=is_bfloat16)

    def watch(self, names: Iterable[str]) -> None:
        """From now on keep these outputs of each run in `watched`, next to logits and cache."""
        self._watched_names = tuple(names)

    def extend(
        self,
        cache: OrtCache | None,
        input_ids: NDArray[np.int64],
        new_mask: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], OrtCache]:
        """See `Session`.

        Args:
            cache: The cache, or None.
            input_ids: Token ids `[B, S]`, shorter prompts padded on the left.
            new_mask: 1 for a token, 0 for padding, `[B, S]`; None is all tokens.
        """
        mask = np.ones_like(input_ids) if new_mask is None else new_mask
        if cache is None:
            past = self._empty_past(input_ids.shape[0])
        else:
            past = cache.past
            mask = np.concatenate([cache.mask, mask], axis=1)
        return self._run(past, input_ids, mask.astype(np.int64, copy=False))

    def close(self) -> None:
        """Free the model and its cache."""
        self.cache = None
        self._session = None

    def _empty_past(self, batch: int) -> tuple[Any, ...]:
        return tuple(
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [batch, slot.heads, 0, slot.head_dim], slot.element_type, self._device
            )
            for slot in self._slots
        )

    def _run(
        self, past: tuple[Any, ...], input_ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], OrtCache]:
        """Run S new tokens after the cached ones; `mask` `[B, P + S]` covers both."""
        session = self._session
        if session is None:
            raise RuntimeError("the session is closed")
        batch, new_tokens = input_ids.shape
        feeds = {
            "input_ids": np.ascontiguousarray(input_ids, dtype=np.int64),
            "attention_mask": np.ascontiguousarray(mask),
            "position_ids": positions_from_mask(mask, new_tokens),
        }
        binding = session.io_binding()
        for name, array in feeds.items():
            if name in self._inputs:  # a model without positions of its own has no such input
                binding.bind_cpu_input(name, array)
        for slot, value in zip(self._slots, past, strict=True):
            binding.bind_ortvalue_input(slot.past, value)
        # The runtime writes the logits straight into our array: a prompt's are tens of megabytes.
        logits = np.empty(
            (batch, new_tokens, self._vocabulary_size),
            NUMPY_TYPES[self._logits_type],
        )
        binding.bind_output(
            "logits",
            _HOST,
            0,
            ONNX_TYPES[self._logits_type],
            list(logits.shape),
            logits.ctypes.data,
        )
        for slot in self._slots:
            binding.bind_output(slot.present, self._device)
        for name in self._watched_names:
            binding.bind_output(name, _HOST)
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[1:]
        extended = OrtCache(past=tuple(outputs[: len(self._slots)]), mask=mask)
        watched = outputs[len(self._slots) :]
        self.watched = {
            name: value.numpy() for name, value in zip(self._watched_names, watched, strict=True)
        }
        is_bfloat16 = self._logits_type == "tensor(bfloat16)"
        return float32_from(logits, is_bfloat16=is_bfloat16), extended
