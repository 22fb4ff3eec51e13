"""The interface that verification, generation and serving run a model through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray


class Session(Protocol):
    """One model on one runtime with its KV cache; not shared between threads."""

    @property
    def vocabulary_size(self) -> int:
        """Width of the logits."""
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
