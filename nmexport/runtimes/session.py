"""The interface that verification, generation and serving run a model through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray


class Closing(ABC):
    """Something that is closed at the end of a `with` block, whatever ended it."""

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


class Session(Protocol):
    """One model on one runtime with its KV cache; not shared between threads."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def limits(self) -> Limits:
        """What the runtime was built for; the model's own window is not among it."""
        ...

    def prefill(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Drop the cache, run whole prompts `[B, S]`, and return logits `[B, S, V]`."""
        ...

    def decode_step(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run one more token a sequence, `[B, 1]`, on the cache, and return logits `[B, 1, V]`."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...

    def __enter__(self) -> Self:
        """Return self."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        ...


class Resumable(Session, Protocol):
    """A session whose cache can be handed to another session of the same architecture."""

    @property
    def state(self) -> Any:
        """The cache as it stands; later runs do not change it."""
        ...

    def restore(self, state: Any) -> None:
        """Continue from a cache."""
        ...


class Timed(Resumable, Protocol):
    """A session whose runs a report describes."""

    @property
    def runtime(self) -> str:
        """What runs the model, with its version."""
        ...

    @property
    def threads(self) -> int | None:
        """Processor threads that it computes with; None where a GPU computes."""
        ...


def is_resumable(session: Session) -> TypeGuard[Resumable]:
    """Whether a session hands over caches; asks its class, since a new session has no cache."""
    return hasattr(type(session), "restore")


class Readable(Session, Protocol):
    """A session whose cache can be read, for comparison with another's."""

    def cache_values(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Keys and values `[B, H, P, D]` under their outputs' names, layer by layer.

        Raises:
            RuntimeError: if nothing has run yet.
        """
        ...


def is_readable(session: Session) -> TypeGuard[Readable]:
    """Whether a session's cache can be read."""
    return hasattr(type(session), "cache_values")


class Extendable(Protocol):
    """A session that keeps many sequences apart: each has a cache, which the caller holds."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def cache_bytes_per_token(self) -> int:
        """What one token of one sequence takes in a cache."""
        ...

    def extend(
        self, cache: Any | None, input_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], Any]:
        """Run tokens `[1, S]` of one sequence after those in its cache.

        Args:
            cache: What the call before gave out for this sequence; None begins one. It must not
                be used again.
            input_ids: Token ids `[1, S]`.

        Returns:
            Logits `[1, S, V]`, and the cache with these tokens in it; dropping it frees it.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def is_extendable(session: Any) -> TypeGuard[Extendable]:
    """Whether a session keeps sequences apart."""
    return hasattr(type(session), "extend")
