"""Counts, by kind, the checkpoint's weights that a build keeps as they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, kw_only=True)
class StoredKind:
    """Weights of a model that are stored alike."""

    form: str
    """Such as `4 bits, groups of 128` or `Q4_1`."""
    tensors: int
    weights: int
    """Numbers in all of them together."""
    reason: str | None = None
    """Why they are dequantised; None where their integers are kept."""


@dataclass(frozen=True, kw_only=True)
class KeptWeights:
    """The fate of a checkpoint's quantised weights."""

    method: str
    """Such as `AWQ` or `GGUF`."""
    kinds: tuple[StoredKind, ...]
    dropped: int = 0
    """Scales of activations and of the cache that are left out."""

    left_out: tuple[str, ...] = ()
    """Mitigations of the recipe that would change weights, and are not used."""

    def sentence(self) -> str:
        """Say it in one sentence."""
        kept = [kind for kind in self.kinds if kind.reason is None]
        others = [kind for kind in self.kinds if kind.reason is not None]
        parts = [f"{kind.tensors} in {kind.form}" for kind in kept]
        text = f"{self.method}: " + (
            f"weights kept as they are stored: {', '.join(parts)}" if parts else "no weights kept"
        )
        for kind in others:
            text += f"; {kind.tensors} in {kind.form} dequantised ({kind.reason})"
        if self.dropped:
            text += f"; {self.dropped} scales of activations or of the cache left out"
        if self.left_out:
            text += f"; {', '.join(self.left_out)} not used, as it would change them"
        return text


def stored_kinds(weights: Iterable[tuple[str, str | None, int]]) -> tuple[StoredKind, ...]:
    """Count weights by form and reason.

    Args:
        weights: Form, reason and size of each.
    """
    tensors: Counter[tuple[str, str | None]] = Counter()
    sizes: Counter[tuple[str, str | None]] = Counter()
    for form, reason, size in weights:
        tensors[form, reason] += 1
        sizes[form, reason] += size
    return tuple(
        StoredKind(form=form, tensors=count, weights=sizes[form, reason], reason=reason)
        for (form, reason), count in sorted(tensors.items(), key=lambda item: str(item[0]))
    )
