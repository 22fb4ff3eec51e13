"""The interface that verification, generation and serving run a model through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray


class Closing(ABC):
    """Something that a `with` block closes."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held."""

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class Limits(NamedTuple):
    """The largest inputs that a session takes; None is any."""

    batch: int | None = None
    """Sequences at a time."""
    tokens: int | None = None
    """Tokens of a sequence, cached and new ones together."""


class Work(NamedTuple):
    """One sequence's part of a step."""

    cache: Any | None
    """A cache of this sequence alone; None begins it."""
    tokens: NDArray[np.int64]
    """Tokens `[S]` that go on from it, at least one."""
    needs_logits: bool = True
    """False where the likeliest next token is all that is wanted, or the cache."""
    goes_on: bool = False
    """The likeliest next token is this sequence's part of the next step, if nothing ends it. Some
    sessions begin with it at once; no result depends on it."""


class Stepped(NamedTuple):
    """One sequence's result of a step."""

    logits: NDArray[np.float32] | None
    """After its last token, `[V]`; None is allowed where the work does not need them."""
    cache: Any
    """Its cache with the tokens in it."""
    token: int
    """The likeliest next token: the first of equals, and of NaNs the first."""


class Session(Closing):
    """One model on one runtime; not shared between threads.

    Everything follows from `extend`: it runs tokens after those in a cache, and the caller holds
    the cache. `prefill` and `decode_step` hold the cache of one batch for callers that have one.
    """

    exposes_cache: bool = False
    """`keep`, `resume`, `cache_values` and `cache_bytes_per_token` work here."""
    shares_steps: bool = False
    """`step` computes all sequences together, each with the bits that it has alone."""
    chunk: int | None = None
    """Prompts must be cut at multiples of so many tokens from their beginning, and nowhere else:
    see `chunks.chunk_end`. None: any cut gives the same bits."""
    decodes_second_half: bool = False
    """A prompt is a whole window, and the second half of it is computed as decoded tokens are."""
    runtime: str = ""
    """Name and version of the runtime."""
    on_gpu: bool = False
    """A GPU computes."""
    threads: int | None = None
    """CPU threads that it computes with; None where a GPU computes."""
    cache: Any | None = None
    """The cache that `prefill` and `decode_step` left; None before the first prefill."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Width of the logits."""

    @property
    def limits(self) -> Limits:
        """The sizes that the runtime was built for, without the model's own window."""
        return Limits()

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in a cache.

        Raises:
            RuntimeError: if this session does not expose its caches.
        """
        raise self._hidden()

    @abstractmethod
    def extend(
        self, cache: Any | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], Any]:
        """Run tokens after those in a cache.

        Args:
            cache: What the call before returned for these sequences; None begins them. It must not
                be used again: see `keep`.
            input_ids: Token ids `[B, S]`.

        Returns:
            Logits `[B, S, V]`, and the cache with these tokens in it; dropping it frees it.
        """

    def extend_last(
        self, cache: Any | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], Any]:
        """Do the same, and return only the last token's logits `[B, 1, V]`.

        Generation needs no more. A runtime that can leave the others out does so: a long prompt's
        are its largest product.
        """
        logits, extended = self.extend(cache, input_ids)
        return logits[:, -1:], extended

    def next_tokens(
        self, cache: Any | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Any]:
        """Do the same, and return only the likeliest next token of each sequence `[B]`.

        It is the first of equals, and of NaNs the first. A runtime on a device may choose there:
        logits are then never copied to the host.
        """
        logits, extended = self.extend_last(cache, input_ids)
        return logits[:, -1].argmax(axis=-1), extended

    def step(self, work: Sequence[Work]) -> list[Stepped]:
        """Run the next tokens of several sequences.

        Args:
            work: Sequences of any lengths, cached and new, in any order.

        Returns:
            A result for each: bit for bit what `extend_last` gives for it alone.
        """
        results = []
        for item in work:
            if item.needs_logits:
                rows, extended = self.extend_last(item.cache, item.tokens[None])
                results.append(Stepped(rows[0, -1], extended, int(rows[0, -1].argmax())))
            else:
                tokens, extended = self.next_tokens(item.cache, item.tokens[None])
                results.append(Stepped(None, extended, int(tokens[0])))
        return results

    def queued_step_ms(self, cache: Any, input_ids: NDArray[np.int64], times: int) -> float | None:
        """Time a decode step in milliseconds, with `times` steps queued back to back.

        The host prepares the next one while the device computes: what is left is the device's time.

        Args:
            cache: As for `extend`; every step is the same one after it.
            input_ids: Token ids `[B, 1]`.
            times: How many steps.

        Returns:
            The time of one; None where this runtime cannot queue steps.
        """
        del cache, input_ids, times
        return None

    def beginning(self, cache: Any, length: int) -> Any | None:
        """Return a cache of the first tokens of one, for sequences that begin alike.

        Its bits are those of a run of these tokens. None where this runtime cannot do that.
        """
        del cache, length
        return None

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that the cache of one sequence of so many tokens takes.

        Raises:
            RuntimeError: if this session does not expose its caches.
        """
        return tokens * self.cache_bytes_per_token

    def keep(self, cache: Any) -> Any:
        """Return a cache that later runs do not change; any session of the architecture takes it.

        Raises:
            RuntimeError: if this session does not expose its caches.
        """
        del cache
        raise self._hidden()

    def resume(self, cache: Any) -> Any:
        """Return a kept cache made ready, so that the next run takes no longer than any other."""
        return cache

    def cache_values(self, cache: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Read keys and values `[B, H, P, D]`, layer by layer, under their outputs' names.

        Raises:
            RuntimeError: if this session does not expose its caches.
        """
        del cache
        raise self._hidden()

    def _hidden(self) -> RuntimeError:
        return RuntimeError(f"{type(self).__name__} does not expose its cache")

    def prefill(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Drop the cache, run whole prompts `[B, S]`, and return logits `[B, S, V]`."""
        self.cache = None  # its memory is free for the next one
        logits, self.cache = self.extend(None, input_ids)
        return logits

    def decode_step(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one more token a sequence, `[B, 1]`, on the cache, and return logits `[B, 1, V]`.

        Raises:
            RuntimeError: if nothing has run yet.
        """
        if self.cache is None:
            raise RuntimeError("decode_step before the first prefill")
        logits, self.cache = self.extend(self.cache, input_ids)
        return logits
