"""Outputs of linears in the channel order of the linear that reads them.

    y = W_down (act(W_gate x) * (W_up x))[p]  =  W_down (act(W_gate[:, p] x) * (W_up[:, p] x))

What lies between is elementwise, so columns can change places once, when a model is folded, and
nothing is gathered at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALONG_OUTPUTS = (
    "W",
    "bias",
    "shift_weight",
    "weight_scale",
    "weight_zero_point",
    "dense_bias",
    "remainder_out",
)
"""Tensors of a folded linear whose last axis is O."""


@dataclass(frozen=True, kw_only=True)
class OutputOrders:
    """Whose outputs lie in whose channel order."""

    readers: Mapping[str, str]
    """By the name of a linear, that of the one that its outputs are laid out for."""
    orders: Mapping[str, torch.Tensor]
    """By the name of a reader, the channel order of its input: `[K]` int32."""

    def applied(
        self, name: str, folded: Mapping[str, torch.Tensor], *, outputs: int
    ) -> dict[str, torch.Tensor]:
        """A folded linear in a model whose linears are laid out so.

        Args:
            name: Of the linear.
            folded: Its tensors, or some of them, as `sparsity.fold` makes them.
            outputs: O.
        """
        return self._written(name, self._read(name, dict(folded)), outputs)

    def _read(self, name: str, folded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without the order that its input lies in already."""
        if name not in self.orders:
            return folded
        if "remainder_in" in folded:  # all else along K lies in gathered order
            order = self.orders[name].long()
            folded["remainder_in"] = folded["remainder_in"][order]
        return {kind: tensor for kind, tensor in folded.items() if kind != "channel_order"}

    def _written(
        self, name: str, folded: dict[str, torch.Tensor], outputs: int
    ) -> dict[str, torch.Tensor]:
        """With its outputs in the order of what reads them."""
        reader = self.readers.get(name)
        if reader is None:
            return folded
        columns = columns_for(self.orders[reader], outputs)
        moved = {kind: folded[kind][..., columns] for kind in _ALONG_OUTPUTS if kind in folded}
        return {**folded, **moved}


NATURAL = OutputOrders(readers={}, orders={})


def columns_for(order: torch.Tensor, outputs: int) -> torch.Tensor:
    """The order of a linear's outputs, `[O]` int64.

    Args:
        order: `[K]`, of the linear that reads them.
        outputs: O, a multiple of K: packed linears lie side by side, each laid out alike.
    """
    starts = torch.arange(0, outputs, len(order)).unsqueeze(1)
    return (starts + order.long()).reshape(-1)
