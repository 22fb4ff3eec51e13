"""Makes channel orders that keep the scale groups of quantised weights whole.

A scale group is a run of neighbouring rows. So channels may change places inside a group, and
groups as wholes; and linears that read one tensor share an order only where their groups allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from nmexport.sparsity.fold_stored import keeps_groups, order_within_groups
from nmexport.sparsity.quantisation import QuantisedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from nmexport.calibration.sites import Site

Integers = Callable[[str], QuantisedWeight | None]
"""The weight of a linear as it came; None where it came as floats."""


def order_for(site: Site, order: torch.Tensor | None, integers: Integers) -> torch.Tensor | None:
    """Find the order nearest to a wished one that keeps all scale groups of a site whole."""
    return _common_order(order, _weights(site, integers))


def in_common_orders(sites: Sequence[Site], integers: Integers) -> list[Site]:
    """Split sites whose weights share no order into sites of single linears."""
    made: list[Site] = []
    for site in sites:
        weights = _weights(site, integers)
        order = _common_order(None, weights)
        if all(keeps_groups(order, weight) for weight in weights):
            made.append(site)
            continue
        made += [
            replace(site, names=(name,), out_features=(outputs,))
            for name, outputs in zip(site.names, site.out_features, strict=True)
        ]
    return made


def _weights(site: Site, integers: Integers) -> list[QuantisedWeight]:
    read = (integers(name) for name in site.names)
    return [weight for weight in read if weight is not None]


def _common_order(
    order: torch.Tensor | None, weights: Sequence[QuantisedWeight]
) -> torch.Tensor | None:
    """Sort by small groups first, then by the larger ones that hold them."""
    for weight in sorted(weights, key=lambda weight: -len(weight.scale)):
        order = order_within_groups(order, weight)
    return order
