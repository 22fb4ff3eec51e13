"""The oracle's products in float64 on a GPU: of a large model they are nearly all of its time.

What is kept, the bounds and every other step stay NumPy's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nmexport.verification.reference import tensor_from

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class DeviceProducts:
    """Computes what `oracle.Products` says on a device."""

    def __init__(self, device: str) -> None:
        """Compute there."""
        self._device = device

    def __call__(
        self, s: NDArray[np.float64], w: NDArray[Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`[..., K]` and `[K, O]` of floats -> `s @ w` and `s^2 @ w^2`, `[..., O]`."""
        with torch.inference_mode():
            kept = torch.from_numpy(s).to(self._device)
            weight = tensor_from(w).to(self._device).double()
            value, squares = kept @ weight, kept.square() @ weight.square()
        return value.cpu().numpy(), squares.cpu().numpy()
