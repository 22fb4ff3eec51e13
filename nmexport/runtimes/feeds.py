"""Arrays that every runtime feeds a model and reads from it: positions, element types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def positions_from_mask(mask: NDArray[np.int64], new_tokens: int) -> NDArray[np.int64]:
    """Position ids of the last `new_tokens` columns, `[B, S]`, counted from the first real token.

    Args:
        mask: Attention mask `[B, P + S]`; 0 marks padding on the left.
        new_tokens: S.
    """
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return np.ascontiguousarray(positions[:, mask.shape[1] - new_tokens :])


def float32_from(buffer: NDArray[Any], *, is_bfloat16: bool) -> NDArray[np.float32]:
    """Values in float32.

    Args:
        buffer: Floats; the bits as uint16 where they are bfloat16, for which NumPy has no name.
        is_bfloat16: Whether they are.
    """
    if is_bfloat16:  # the upper half of a float32
        widened = buffer.astype(np.uint32) << np.uint32(16)
        return cast("NDArray[np.float32]", widened.view(np.float32))
    return buffer.astype(np.float32, copy=False)
